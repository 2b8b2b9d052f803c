"""`looped export`: a run as a transformers model folder, with its tokenizer and a model card."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from looped.atomic_files import new_folder
from looped.data.tokenizer_files import MARK
from looped.errors import UserError, did_you_mean
from looped.hub.card import Card
from looped.hub.families import FAMILIES
from looped.hub.families.base import Family
from looped.hub.importing import max_length_of
from looped.hub.loading import import_transformers, quiet
from looped.hub.logits_api import reader_of
from looped.training.runs import Run, read_stamp

ELSEWHERE = {"data.path": (), "data.tokenizer": None, "data.cache_dir": None, "training.warm_start": None}
"""Settings that name local files, and their values in an exported model, which does not need these files."""


@dataclass(frozen=True)
class Form:
    """A layout of a model's folder. write: (run, folder, depth) writes config.json and weights, and raises UserError
    for a model that does not fit the layout; alone: the model loads without this package."""

    write: Callable[[Run, Path, int], None]
    alone: bool


def export(run: Run, out: str | Path, to: str = "hf", *, num_steps: int | None = None,
           licence: str | None = None) -> Path:
    """Write the model of a run to the folder `out`, in a form of `FORMS`.

    num_steps: the default depth, for a dense form the fixed depth; None: the depth of training. licence: for the model
    card. Raises UserError, and leaves nothing behind, for a model that does not fit the form, and if `out` exists.
    """
    if to not in FORMS:
        raise UserError(f"--to {to} is unknown{did_you_mean(to, FORMS)}")
    import_transformers(str(run.path), "exporting")
    if not run.config.kind.writes:
        raise UserError(f"run {run.path} is trained on {run.config.kind.noun}, but only language models are exported; "
                        f"export a run on text")
    depth, form = num_steps or run.config.main_depth, FORMS[to]
    with new_folder(out) as folder, quiet():
        form.write(run, folder, depth)
        _write_tokenizer(run, folder)
        card = Card(run, to, depth, licence or read_stamp(run.path).get("imported", {}).get("licence"), form.alone)
        (folder / "README.md").write_text(card.text(folder), encoding="utf-8", newline="")
    return Path(out)


def _write_looped(run: Run, folder: Path, depth: int) -> None:
    from looped.hub.wrapper import LoopedConfig, LoopedForCausalLM

    settings = run.config.replace(**ELSEWHERE)
    config = LoopedConfig(looped=settings.model_dump(mode="json"), num_steps=depth,
                          vocab_size=run.objective.model.vocab_size, dtype="float32", **tokens_of(run))
    LoopedForCausalLM.holding(run.objective, config).save_pretrained(folder)


def tokens_of(run: Run) -> dict[str, Any]:
    """Config entries for the begin, end and padding tokens of texts, and their maximum length."""
    raw: Mapping[str, Any] = read_stamp(run.path).get("imported", {}).get("config", {})
    end = run.tokenizer.end_of_text
    return {"bos_token_id": raw.get("bos_token_id", end), "eos_token_id": end, "pad_token_id": end,
            "max_position_embeddings": max_length_of(run)}


def _write_tokenizer(run: Run, folder: Path) -> None:
    """Writes the run's tokenizer for transformers; its tokenizer.json is kept verbatim, except for our mark."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fields, end = json.loads(run.tokenizer.json()), run.tokenizer.end_token
    for token in fields["added_tokens"]:
        token.pop(MARK, None)
    content = json.dumps(fields, ensure_ascii=False)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content), eos_token=end, bos_token=end, pad_token=end,
                            padding_side="left", clean_up_tokenization_spaces=False).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8", newline="")


def _write_family(run: Run, folder: Path, depth: int, *, family: Family) -> None:
    from huggingface_hub import save_torch_state_dict

    reader_of(run.objective, run.config).check_layers(family.name)
    model = run.objective.model
    layout = family.written(run.config, model.vocab_size, depth)
    raw = {**layout.raw, **tokens_of(run), "dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(raw, indent=1), encoding="utf-8", newline="")
    save_torch_state_dict(dict(layout.tensors(model.state_dict())), folder, shared_tensors_to_discard=[])


FORMS: dict[str, Form] = {"hf": Form(_write_looped, alone=False)} | {
    family.name.removesuffix("_raven"): Form(partial(_write_family, family=family), alone=True)
    for family in FAMILIES if type(family).written is not Family.written}
"""Value of `--to` -> form."""
