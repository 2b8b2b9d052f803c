"""Runs of one block alone (`blocks.alone`): opened for merging, or as the source of shared parts for another block.

Two such runs fit together if they have the same config, the same data and bitwise the same shared parts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looped.config import Config, load_config
from looped.errors import UserError
from looped.objectives.active_block import OneBlock
from looped.training.checkpoint import DamagedError, Tensors, check, check_same, list_checkpoints, load_tensors
from looped.training.counters import Counters
from looped.training.resume_rules import FREE_AT_RESTART, differences, is_one_of
from looped.training.runs import CONFIG, own_tokenizer

OWN = ("blocks.alone", "blocks.shared_from", "data.path", "data.cache_dir", "images.path", "training.threads",
       "training.wandb")
"""Settings in which the runs of single blocks may differ: the block, and what depends on the machine. The data are
compared by their fingerprint."""


@dataclass(frozen=True)
class Part:
    """A finished run of one block: the config, and the newest checkpoint with its state."""

    path: Path
    config: Config
    checkpoint: Path
    state: dict[str, Any]

    @property
    def block(self) -> int:
        assert self.config.blocks.alone is not None
        return self.config.blocks.alone

    @property
    def counters(self) -> Counters:
        return Counters.of(self.state)

    @property
    def averages(self) -> bool:
        """True if the run has EMA weights."""
        return self.config.optim.ema_decay > 0

    @property
    def vocabulary(self) -> str | None:
        """The content of its tokenizer.json; None for tasks and images."""
        tokenizer = own_tokenizer(self.path)
        return tokenizer and tokenizer.json()

    def tensors(self, name: str) -> Tensors:
        return load_tensors(self.checkpoint, name)

    @cached_property
    def result(self) -> Tensors:
        """The final weights: the EMA weights if there are any."""
        return self.tensors("ema" if self.averages else "model")


def open_part(path: Path) -> Part:
    """Open a finished run of one block. Raises UserError if it is not one, is unfinished or is damaged."""
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is not a run: it has no {CONFIG}; pass the folder that `looped train --block` wrote")
    config, again = load_config(path / CONFIG), f"run looped train {path / CONFIG} again to finish it"
    if config.blocks.alone is None:
        raise UserError(f"{path} is not a run of a single block (blocks.alone is null); pass runs of "
                        f"`looped train --block`")
    found = list_checkpoints(path)
    if not found:
        raise UserError(f"run {path} has no checkpoint yet; {again}")
    try:
        state = check(found[0])
    except DamagedError as reason:
        raise UserError(f"checkpoint {found[0]} is damaged: {reason}; {again} from the one before") from None
    part = Part(path, config, found[0], state)
    training = config.training
    if part.counters.fraction(training) < 1:
        raise UserError(f"run {path} is unfinished: {part.counters.spent(training.budget_unit):g} of its budget of "
                        f"{training.budget} {training.budget_unit} are spent; {again}")
    return part


def whole_config(config: Config) -> Config:
    """The config of the whole model, with all blocks."""
    return config.replace(**{"blocks.alone": None, "blocks.shared_from": None})


def check_fits(part: Part, config: Config, data: str, beside: str | Path) -> None:
    """Check that a run has the settings of `config` and data with the fingerprint `data`. Raises UserError for the
    first difference; `beside`: name of the run that it is compared with."""
    for each in differences(_common(config), _common(part.config)):
        if not is_one_of(each.setting, FREE_AT_RESTART):
            raise UserError(f"{part.path} was trained with {each.setting} {each.new!r} and {beside} with {each.old!r}; "
                            f"train both blocks with the same settings")
    if part.state["data"] != data:
        raise UserError(f"{part.path} and {beside} were trained on different data, though their settings are the same; "
                        f"train both on the same files")


def _common(config: Config) -> dict[str, Any]:
    """The settings that must be the same in the runs of all blocks."""
    values = config.model_dump(mode="json")
    for name in OWN:
        section, _, setting = name.partition(".")
        del values[section][setting]
    return values


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def shared_names(objective: OneBlock, names: Iterable[str]) -> list[str]:
    """The names that belong to no single block."""
    own = set().union(*(objective.names_of(block) for block in range(objective.blocks.num)))
    return [name for name in names if name not in own]


@torch.no_grad()
def take_shared(objective: OneBlock, config: Config, data: str) -> None:
    """Copy the shared parts of the run `blocks.shared_from` into the model of another block. Raises UserError if it is
    not the finished run of block `blocks.shared_by` with the same config and data."""
    part = open_part(Path(str(config.blocks.shared_from)))
    if part.block != config.blocks.shared_by:
        raise UserError(f"blocks.shared_from {part.path} is the run of block {part.block}, and the shared parts are "
                        f"trained with block {config.blocks.shared_by} (blocks.shared_by); give the run of that block")
    check_fits(part, config, data, "this run")
    weights: Mapping[str, Tensor] = dict(objective.named_parameters())
    expected = {name: weights[name] for name in shared_names(objective, weights)}
    check_same(expected, {name: part.result[name] for name in expected if name in part.result}, part.checkpoint)
    for name, weight in expected.items():
        weight.copy_(part.result[name])
