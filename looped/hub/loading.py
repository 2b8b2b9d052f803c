"""Loading of models and tokenizers from the Hugging Face hub or a local folder, by transformers.

Weights are read from safetensors only, and no code of a repository is run, so naming a model is safe.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

import torch
from torch import nn

from looped.errors import UserError

WAY_OUT = "name a run's folder, a model's folder, or a model of the Hugging Face hub"


def load(name: str, kind: str) -> tuple[Any, Any]:
    """(model in float32 and evaluation mode, its fast tokenizer); `kind` is a class of transformers such as AutoModel.

    Raises `UserError` if transformers, the model, its safetensors, some of its weights or its tokenizer are missing.
    """
    transformers = import_transformers(name)
    _check_folder(name)
    with quiet(), _in_one_sentence(name):
        transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)  # first: it fails fastest
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, report = getattr(transformers, kind).from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # poolers are not used here
    if missing:
        raise UserError(f"model {name} has no weights '{missing[0]}', which {kind} needs; name another one")
    if not tokenizer.is_fast:
        raise UserError(f"model {name} has no fast tokenizer, which is needed for the offsets of tokens in a text; "
                        f"name another one")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"model {name} has {model.get_input_embeddings().num_embeddings} embeddings for the "
                        f"{len(tokenizer)} tokens of its tokenizer; save it with a matching tokenizer")
    return model.eval(), tokenizer


def import_transformers(name: str, what: str = "reading with") -> ModuleType:
    """The module transformers. Raises UserError if it is missing."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"{what} {name} needs transformers; pip install 'looped[hub]'") from None
    return transformers


def _check_folder(name: str) -> None:
    """Raises UserError if a name that can only be a path does not lead to a model."""
    path = Path(name).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"{name} is neither a run, with a config.yaml, nor a model's folder, with a config.json; "
                        f"{WAY_OUT}")
    if not path.exists() and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise UserError(f"{name} does not exist; {WAY_OUT}")


@contextmanager
def _in_one_sentence(name: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, LookupError, RuntimeError, SafetensorError) as error:
        reason = shorten(str(error).strip().split("\n")[0].split(". ")[0].rstrip(".: "), 160) or type(error).__name__
        raise UserError(f"model {name} cannot be loaded ({reason}); {WAY_OUT} with safetensors and a "
                        f"fast tokenizer") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the libraries' progress bars and warnings; errors are reported once, by us."""
    import huggingface_hub
    import transformers

    loggers = [transformers.utils.logging, huggingface_hub.utils.logging]
    levels = [logger.get_verbosity() for logger in loggers]
    had_bars = transformers.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        if had_bars:
            transformers.utils.logging.enable_progress_bar()


def batches(tokenizer: Any, rows: list[list[int]], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, attention mask) of `size` rows at a time, padded on the right."""
    filler = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        lengths = torch.tensor([len(row) for row in part])
        ids = [row + [filler] * (int(lengths.max()) - len(row)) for row in part]
        yield torch.tensor(ids), (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()


def max_length(model: nn.Module) -> int | None:
    """Context length of a model in tokens, None if unlimited."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
