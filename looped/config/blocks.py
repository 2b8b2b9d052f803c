"""Settings of a core of several blocks with separate weights; one block is the weight-tied loop."""

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator

from looped.config.base import Count, Depth, NonNegative, Positive, Section


class BlocksConfig(Section):
    """Blocks of the core: their number and layers, and under `blockwise` their noise levels and training."""

    num: Depth = Field(
        default=1,
        description="blocks of the core: loop steps cycle through them; under `blockwise` and `masked` each has its "
                    "own noise levels, the first the highest; 1 is the weight-tied loop")
    layers: tuple[Depth, ...] | None = Field(
        default=None, description="layers of each block, as [4, 4, 4]; null: model.num_core_layers split evenly")
    partition: Literal["mass", "log-uniform"] = Field(
        default="mass",
        description="noise levels per block: equal mass under the training distribution without noise.share_at_max "
                    "(the paper's equi-probability), or equal width in ln sigma")
    edges: tuple[Positive, ...] | None = Field(
        default=None,
        description="noise levels between neighbouring blocks, decreasing, as [5.0, 1.2]; null: set by "
                    "blocks.partition")
    edges_from: str | None = Field(
        default=None,
        description="a finished run of objective denoise with denoise.noise.distribution adaptive: `looped train` "
                    "derives the edges from its measured cross-entropy, which then rises equally in each block, and "
                    "saves them as blocks.edges of the new run")
    overlap: NonNegative = Field(
        default=0.05,
        description="overlap of a block's training range [lo, hi] with its neighbours': both ends are widened by a "
                    "factor (hi / lo)^overlap (the paper's gamma); under `masked`, by this fraction of the block's "
                    "decrement of alpha")
    choose: Literal["uniform", "mass"] = Field(
        default="uniform",
        description="sampling of the block that an optimiser step trains: uniform, or by the mass of its own levels in "
                    "the training distribution, with noise.share_at_max in the first block")
    shared: Literal["trained", "frozen", "with-block"] = Field(
        default="trained",
        description="training of the parts that all blocks share (embeddings, prelude, coda, norm, head, level "
                    "embedding, targets). trained: in the steps of every block, which adds their gradients and "
                    "optimiser state to each block's; no block can be trained alone. frozen: kept at their initial "
                    "values, without gradients or optimiser state. with-block: only in the steps of block "
                    "blocks.shared_by; the other blocks use them unchanged, and one trained alone needs that block's "
                    "finished run")
    shared_by: Count = Field(
        default=0, description="under `shared: with-block`, the block that trains the shared parts")
    shared_from: str | None = Field(
        default=None,
        description="under `shared: with-block`, the finished run of block shared_by alone, whose shared parts another "
                    "block trained alone loads and keeps fixed")
    alone: Count | None = Field(
        default=None,
        description="build and train only this block (`looped train --block`); `looped merge` combines the runs of all "
                    "blocks. null: all blocks")

    @model_validator(mode="after")
    def _check_edges(self):
        if self.edges is not None and self.edges_from is not None:
            raise ValueError(f"edges_from {self.edges_from} and edges {list(self.edges)} are both set; keep one of "
                             f"them")
        if self.edges is None:
            return self
        if len(self.edges) != self.num - 1:
            raise ValueError(f"edges {list(self.edges)} separate {len(self.edges) + 1} blocks, but num is {self.num}; "
                             f"set blocks.num to {len(self.edges) + 1}, or give {self.num - 1} edges")
        if any(high <= low for high, low in pairwise(self.edges)):
            raise ValueError(f"edges {list(self.edges)} do not decrease, but the first block has the highest noise; "
                             f"give {sorted(set(self.edges), reverse=True)}")
        return self

    @model_validator(mode="after")
    def _check_layers(self):
        if self.layers is not None and len(self.layers) != self.num:
            raise ValueError(f"layers {list(self.layers)} describe {len(self.layers)} blocks, but num is {self.num}; "
                             f"set blocks.num to {len(self.layers)}, or give one number per block")
        return self

    @model_validator(mode="after")
    def _check_alone(self):
        by = self.shared_by
        if self.alone is not None and self.alone >= self.num:
            raise ValueError(f"alone {self.alone} is not one of num {self.num} blocks; give 0 to {self.num - 1}")
        if by >= self.num:
            raise ValueError(f"shared_by {by} is not one of num {self.num} blocks; give 0 to {self.num - 1}")
        if self.alone is not None and self.shared == "trained":
            raise ValueError(f"alone {self.alone} excludes shared trained, the default, since no other block would get "
                             f"the shared parts that it trains; set blocks.shared to frozen or with-block")
        reads = self.shared == "with-block" and self.alone not in (None, by)
        if reads and self.shared_from is None:
            raise ValueError(f"alone {self.alone} needs the shared parts that block {by} trains (shared_by); train "
                             "that block first, and set blocks.shared_from to its run")
        if self.shared_from is not None and not reads:
            raise ValueError(f"shared_from {self.shared_from} needs shared with-block and a block alone that is not "
                             f"shared_by; leave it out")
        return self

    @property
    def held(self) -> tuple[int, ...]:
        """The blocks that this run builds."""
        return tuple(range(self.num)) if self.alone is None else (self.alone,)

    def trains_shared(self, block: int) -> bool:
        """True if the parts outside the block's own layers are trained in its steps."""
        return self.shared == "trained" or (self.shared == "with-block" and block == self.shared_by)

    def split(self, num_core_layers: int) -> tuple[int, ...]:
        """Number of layers in each block of a core with `num_core_layers` layers."""
        return self.layers or (num_core_layers // self.num,) * self.num


def check_blocks(config: Any) -> None:
    """Raises ValueError if the blocks of a config do not fit its model or its training rule."""
    blocks, total = config.blocks, config.model.num_core_layers
    if sum(blocks.split(total)) != total:
        _refuse_split(blocks, total)
    if blocks.edges_from is not None and not config.rule.independent:
        raise ValueError(f"blocks.edges_from {blocks.edges_from} is for objective blockwise, and objective is "
                         f"{config.objective}; leave it out")
    if blocks.alone is not None:
        _check_alone(config)


def _refuse_split(blocks: BlocksConfig, total: int) -> None:
    if blocks.layers is not None:
        raise ValueError(f"blocks.layers {list(blocks.layers)} add up to {sum(blocks.layers)} layers, and "
                         f"model.num_core_layers is {total}; set model.num_core_layers to {sum(blocks.layers)}")
    low = max(1, total // blocks.num) * blocks.num
    ways = f"{low} or {low + blocks.num}" if low < total else str(low)
    raise ValueError(f"model.num_core_layers {total} does not split into blocks.num {blocks.num} equal blocks; set it "
                     f"to {ways}, or give the layers of each block by blocks.layers")


def _check_alone(config: Any) -> None:
    alone = config.blocks.alone
    if not config.rule.independent:
        raise ValueError(f"blocks.alone {alone} is for objective blockwise, whose blocks train independently, and "
                         f"objective is {config.objective}; leave it out")
    if config.training.sample_every:
        raise ValueError(f"training.sample_every {config.training.sample_every} needs all blocks to draw samples, "
                         f"but blocks.alone is {alone}; set it to 0")


def check_blockwise(config: Any) -> None:
    """Raises ValueError unless one noise level selects the active block, and a shared latent finds all blocks."""
    blocks, denoise, noise = config.blocks, config.denoise, config.denoise.noise
    if blocks.num < 2:
        raise ValueError("objective blockwise trains one of several blocks at a time, and blocks.num is 1; set "
                         "objective to denoise, or blocks.num to 2 or more")
    alone = {"order": "together", "train_steps": 1}
    for name, value in alone.items():
        if getattr(denoise, name) != value:
            raise ValueError(f"denoise.{name} {getattr(denoise, name)} needs one block for all noise levels, "
                             f"and objective blockwise splits them among its blocks; set it to {value}")
    if denoise.carry == "latent" and blocks.alone is not None:
        raise ValueError(f"denoise.carry latent gives a block the output of those above it, and blocks.alone "
                         f"{blocks.alone} trains without them; set it to none or estimate")
    if noise.distribution == "adaptive":
        raise ValueError("denoise.noise.distribution adaptive would move the edges between blocks while objective "
                         "blockwise trains them; set it to log-uniform or log-normal")
    if blocks.choose == "mass" and noise.share_at_max == 1:
        raise ValueError("blocks.choose mass with denoise.noise.share_at_max 1.0 trains the first block alone; set "
                         "blocks.choose to uniform")
    if blocks.edges is not None and not noise.sigma_min < blocks.edges[-1] <= blocks.edges[0] < noise.sigma_max:
        raise ValueError(f"blocks.edges {list(blocks.edges)} do not lie between denoise.noise.sigma_min "
                         f"{noise.sigma_min} and denoise.noise.sigma_max {noise.sigma_max}; move them inside")
