"""Settings of a core of several blocks, each with weights of its own; one block is the weight-tied loop."""

from typing import Any

from pydantic import Field, model_validator

from looped.config_base import Depth, Section

RULES = ("full", "truncated", "ar")
"""Training rules that know several blocks: a step of the loop takes the next one. The others go on from a state as if
every step were the same map."""


class BlocksConfig(Section):
    """Blocks of the core: how many, and how deep each is."""

    num: Depth = Field(1, description="blocks of the core, applied in turn; 1 is the weight-tied loop")
    layers: tuple[Depth, ...] | None = Field(
        None, description="layers of each block, as [4, 4, 4]; null: model.num_core_layers split evenly")

    @model_validator(mode="after")
    def _check_layers(self):
        if self.layers is not None and len(self.layers) != self.num:
            raise ValueError(f"layers {list(self.layers)} are those of {len(self.layers)} blocks, and num is "
                             f"{self.num}; set blocks.num to {len(self.layers)}, or give a number for each block")
        return self

    def split(self, num_core_layers: int) -> tuple[int, ...]:
        """Layers of each block of a core that has so many in all."""
        return self.layers or (num_core_layers // self.num,) * self.num


def check_blocks(config: Any) -> None:
    """Whether the blocks of a whole config go with its model and its training rule. Raises ValueError."""
    blocks, total = config.blocks, config.model.num_core_layers
    if sum(blocks.split(total)) != total:
        _refuse_split(blocks, total)
    if blocks.num > 1:
        _check_rule(config)


def _refuse_split(blocks: BlocksConfig, total: int) -> None:
    if blocks.layers is not None:
        raise ValueError(f"blocks.layers {list(blocks.layers)} add up to {sum(blocks.layers)} layers, and "
                         f"model.num_core_layers is {total}; set model.num_core_layers to {sum(blocks.layers)}")
    low = max(1, total // blocks.num) * blocks.num
    ways = f"{low} or {low + blocks.num}" if low < total else str(low)
    raise ValueError(f"model.num_core_layers {total} does not split into blocks.num {blocks.num} equal blocks; set it "
                     f"to {ways}, or say with blocks.layers how many each has")


def _check_rule(config: Any) -> None:
    num, recurrence, rule = config.blocks.num, config.recurrence, config.objective
    if rule not in RULES:
        raise ValueError(f"objective {rule} knows one block alone, and blocks.num is {num}; set blocks.num to 1, or "
                         f"objective to {', '.join(RULES[:-1])} or {RULES[-1]}")
    if rule == "ar":
        return
    if recurrence.mean % num:
        raise ValueError(f"recurrence.mean {recurrence.mean} ends inside a pass through blocks.num {num} blocks; set "
                         f"it to {max(1, recurrence.mean // num) * num}")
    if rule == "truncated" and recurrence.distribution != "fixed":
        raise ValueError(f"recurrence.distribution {recurrence.distribution} draws depths that end inside a pass "
                         f"through blocks.num {num} blocks; set it to fixed")
    if rule == "truncated" and recurrence.backprop < num:
        raise ValueError(f"recurrence.backprop {recurrence.backprop} leaves some of blocks.num {num} blocks without "
                         f"gradient; set it to {num} or more")
