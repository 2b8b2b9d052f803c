"""`looped export`: a run as a transformers model folder, with its tokenizer and a model card."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from looped.atomic_files import new_folder
from looped.errors import UserError, did_you_mean
from looped.hub.card import Card
from looped.hub.families import FAMILIES
from looped.hub.families.base import Family
from looped.hub.importing import max_length_of
from looped.hub.loading import import_transformers, quiet
from looped.hub.logits_api import reader_of
from looped.hub.special_tokens import tokens_of, write_tokenizer
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
        write_tokenizer(run, folder)
        card = Card(run, to, depth, licence or read_stamp(run.path).get("imported", {}).get("licence"), form.alone)
        (folder / "README.md").write_text(card.text(folder), encoding="utf-8", newline="")
    return Path(out)


def _write_looped(run: Run, folder: Path, depth: int) -> None:
    from looped.hub.wrapper import LoopedConfig, LoopedForCausalLM

    settings = run.config.replace(**ELSEWHERE)
    config = LoopedConfig(looped=settings.model_dump(mode="json"), num_steps=depth,
                          vocab_size=run.objective.model.vocab_size, dtype="float32",
                          max_position_embeddings=max_length_of(run), **tokens_of(run))
    LoopedForCausalLM.holding(run.objective, config).save_pretrained(folder)


def _write_family(run: Run, folder: Path, depth: int, *, family: Family) -> None:
    from huggingface_hub import save_torch_state_dict

    reader_of(run.objective, run.config).check_layers(family.name)
    model = run.objective.model
    layout = family.written(run.config, model.vocab_size, depth)
    raw = {**layout.raw, **tokens_of(run), "max_position_embeddings": max_length_of(run),
           "dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(raw, indent=1), encoding="utf-8", newline="")
    save_torch_state_dict(dict(layout.tensors(model.state_dict())), folder, shared_tensors_to_discard=[])


FORMS: dict[str, Form] = {"hf": Form(_write_looped, alone=False)} | {
    family.name.removesuffix("_raven"): Form(partial(_write_family, family=family), alone=True)
    for family in FAMILIES if type(family).written is not Family.written}
"""Value of `--to` -> form."""
