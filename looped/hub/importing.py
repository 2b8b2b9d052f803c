"""`looped import`: a pretrained model as a run at step 0, which every verb accepts.

Weights are copied from file to file one at a time, so importing takes the memory of the model's largest tensor.
"""

import json
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from looped.atomic_files import new_folder, write_text
from looped.config import Config, dump_config
from looped.data.tokenizer import TextTokenizer, load_tokenizer
from looped.data.tokenizer_hub import fetched, is_name
from looped.errors import UserError, one_line
from looped.hub.families import Pretrained, open_pretrained
from looped.hub.special_tokens import declared, ends_in
from looped.objectives import build_objective
from looped.training.checkpoint import Stream, save_checkpoint
from looped.training.counters import Counters
from looped.training.runs import CONFIG, STAMP, TOKENIZER, Run, read_stamp, stamp

FETCHED = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
           "special_tokens_map.json", "vocab.json", "merges.txt", "*.model", "chat_template.jinja", "README.md")
"""The files fetched from a hub repository; no code, no pickles."""

LIMITS = ("max_position_embeddings", "block_size", "n_positions")
"""The keys of a config.json for a model's context length."""


@dataclass(frozen=True)
class Imported:
    """A run made from a pretrained model. parameters: number of parameters."""

    path: Path
    family: str
    parameters: int
    config: Config


def import_model(source: str | Path, out: str | Path, *, layers: str | None = None,
                 tokenizer: str | Path | None = None, settings: Mapping[str, Any] | None = None) -> Imported:
    """Write the run `out` from a model's folder, or from a repository of the Hugging Face hub, NAME or NAME@REVISION.

    layers: "P/N/C", the cut of a dense stack (`read_pretrained`). tokenizer: a tokenizer.json or a folder with one, if
    the model's folder has none. settings: of the run's config, such as its data. Raises UserError, and leaves nothing
    behind, if `source` is no such model, tensors are missing, left over or of another shape, the tokenizer does not
    fit, or `out` exists.
    """
    with new_folder(out) as folder:
        source_folder = _located(source)
        kept = {"data.tokenizer": str(out), **(settings or {})}
        found = open_pretrained(source_folder, layers, kept | {"model.padded_vocab_size": "null"})
        words = _tokenizer(found, tokenizer)
        if words.vocab_size < found.vocab_size:
            found = open_pretrained(source_folder, layers, kept | {"model.padded_vocab_size": found.vocab_size})
        elif words.vocab_size > found.vocab_size:
            raise UserError(f"{source} has {found.vocab_size} embeddings, but its tokenizer has {words.vocab_size} "
                            f"tokens; give the matching tokenizer with --tokenizer")
        _write(folder, found, words, str(source), declared(_beside(tokenizer or found.folder)))
    shapes = found.skeleton.state_dict().values()
    return Imported(Path(out), found.family.name, sum(weight.numel() for weight in shapes), found.config)


def max_length_of(run: Run) -> int:
    """The context length of a run in tokens: that of the imported model's config, else that of training."""
    imported = read_stamp(run.path).get("imported", {}).get("config", {})
    return next((imported[name] for name in LIMITS if imported.get(name)), run.config.data.length)


def _write(folder: Path, found: Pretrained, words: TextTokenizer, source: str, said: Mapping[str, Any]) -> None:
    objective = build_objective(found.config, found.skeleton, words.end_of_text)
    shapes = {name: weight.shape for name, weight in objective.state_dict().items()}
    own = sorted(shapes.keys() - {f"model.{name}" for name in found.skeleton.state_dict()})
    if own:
        raise UserError(f"objective {found.config.objective} adds weights ({own[0]}) that {source} does not have; "
                        f"import it without --objective, then train with this objective and training.warm_start")
    weights = ((f"model.{name}", weight) for name, weight in found.weights())  # checked here, before a file is written
    imported = {"imported": {"source": source, "family": found.family.name, "licence": _licence(found.folder),
                             "config": dict(found.raw), "ends": ends_in(found.folder, found.raw), "tokenizer": said}}
    write_text(folder / STAMP, json.dumps(stamp(found.config, "cpu") | imported, indent=1))
    write_text(folder / TOKENIZER, words.json())
    state = asdict(Counters()) | {"vocab_size": words.vocab_size, "picture": None, "end_of_text": words.end_of_text,
                                  "data": None, "meter": {}, "groups": []}
    save_checkpoint(folder, 0, {"optimizer": {}}, state, keep=1, streams={"model": Stream(shapes, weights)})
    write_text(folder / CONFIG, dump_config(found.config))


def _licence(folder: Path) -> str | None:
    """The licence stated in the model card, if any."""
    try:
        _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        said = yaml.safe_load(front)["license"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
    return said if isinstance(said, str) else None


def _tokenizer(found: Pretrained, given: str | Path | None) -> TextTokenizer:
    """The tokenizer of a model, given or from its folder, with the end-of-text token of its config."""
    end = found.raw.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    try:
        return load_tokenizer(given or found.folder, end=end)
    except UserError as error:
        raise UserError(str(error).replace("data.tokenizer", "tokenizer").replace(
            "or leave it null to train one", "and give it with --tokenizer")) from None


def _beside(tokenizer: str | Path) -> Path:
    """The folder of a tokenizer, with the files that declare its special tokens."""
    path = Path(tokenizer).expanduser()
    if not path.exists() and is_name(str(tokenizer)):
        path = fetched(str(tokenizer))
    return path if path.is_dir() else path.parent


def _located(source: str | Path) -> Path:
    """The folder of a model; a hub model is fetched, its weights and tokenizer only."""
    path = Path(source).expanduser()
    name, _, revision = str(source).partition("@")
    if path.exists() or str(source).startswith((".", "~", "/")) or name.count("/") > 1:
        if not path.is_dir():
            raise UserError(f"{source} is not a model's folder; give one that save_pretrained wrote, or a name on the "
                            f"Hugging Face hub")
        return path
    from huggingface_hub import snapshot_download

    with _asked(name):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FETCHED)))


@contextmanager
def _asked(name: str):
    """Turns errors of the hub, such as an unknown name or no network, into a one-sentence UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not a local folder, and cannot be fetched from the Hugging Face hub "
                        f"({one_line(error)}); give a folder, or look up the name on huggingface.co") from None
