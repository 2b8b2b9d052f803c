"""Settings of a core of several blocks, each with weights of its own; one block is the weight-tied loop."""

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator

from looped.config.base import Count, Depth, NonNegative, Positive, Section


class BlocksConfig(Section):
    """Blocks of the core: how many, how deep, and under `blockwise` which noise levels each has and how it is trained.
    """

    num: Depth = Field(1, description="blocks of the core: loop steps take them in turn, under `blockwise` and "
                                      "`masked` each has noise levels of its own, the first the highest; 1 is the "
                                      "weight-tied loop")
    layers: tuple[Depth, ...] | None = Field(
        None, description="layers of each block, as [4, 4, 4]; null: model.num_core_layers split evenly")
    partition: Literal["mass", "log-uniform"] = Field(
        "mass", description="noise levels of a block: of equal mass under the training distribution without "
                            "noise.share_at_max (the paper's equi-probability), or even in ln sigma")
    edges: tuple[Positive, ...] | None = Field(
        None, description="the levels between neighbouring blocks themselves, falling, as [5.0, 1.2]; null: as "
                          "blocks.partition says")
    edges_from: str | None = Field(
        None, description="a finished run of objective denoise with denoise.noise.distribution adaptive, from whose "
                          "measured difficulty `looped train` takes the edges: each block has the same rise of the "
                          "cross-entropy. The run that it trains keeps them as blocks.edges")
    overlap: NonNegative = Field(0.05, description="how far a block is trained on its neighbours' levels: its ends "
                                                   "moved by this power of their ratio (the paper's gamma); under "
                          "`masked`, by this share of its decrement of alpha")
    choose: Literal["uniform", "mass"] = Field(
        "uniform", description="which block an optimiser step trains: each as often, or as often as its own levels are "
                               "in the training distribution, where noise.share_at_max is the first block's")
    shared: Literal["trained", "frozen", "with-block"] = Field(
        "trained", description="what is no block's own (embeddings, prelude, coda, norm, head, level embedding, "
                               "targets). trained: by each block at work, at the price of its gradients and optimiser "
                               "state beside every block's, and no block can be trained alone. frozen: left at its "
                               "first values, which costs neither, and whatever it would have learned. with-block: by "
                               "blocks.shared_by at work alone, at the price of that block's steps; the others do not "
                               "adapt it to themselves, and alone they wait for that block's run")
    shared_by: Count = Field(0, description="under `shared: with-block` the block that trains what all share")
    shared_from: str | None = Field(
        None, description="under `shared: with-block` the finished run of block shared_by alone, whose shared parts "
                          "another block alone reads and keeps as they are")
    alone: Count | None = Field(
        None, description="hold and train this block and no other, on this machine and at this time (`looped train "
                          "--block`); `looped merge` puts the runs of all blocks together. null: all of them")

    @model_validator(mode="after")
    def _check_edges(self):
        if self.edges is not None and self.edges_from is not None:
            raise ValueError(f"edges_from {self.edges_from} measures what edges {list(self.edges)} say; keep one of "
                             f"them")
        if self.edges is None:
            return self
        if len(self.edges) != self.num - 1:
            raise ValueError(f"edges {list(self.edges)} part {len(self.edges) + 1} blocks, and num is {self.num}; set "
                             f"blocks.num to {len(self.edges) + 1}, or give {self.num - 1} edges")
        if any(high <= low for high, low in pairwise(self.edges)):
            raise ValueError(f"edges {list(self.edges)} do not fall, and the first block has the highest noise; give "
                             f"{sorted(set(self.edges), reverse=True)}")
        return self

    @model_validator(mode="after")
    def _check_layers(self):
        if self.layers is not None and len(self.layers) != self.num:
            raise ValueError(f"layers {list(self.layers)} are those of {len(self.layers)} blocks, and num is "
                             f"{self.num}; set blocks.num to {len(self.layers)}, or give a number for each block")
        return self

    @model_validator(mode="after")
    def _check_alone(self):
        by = self.shared_by
        if self.alone is not None and self.alone >= self.num:
            raise ValueError(f"alone {self.alone} is not one of num {self.num} blocks; give 0 to {self.num - 1}")
        if by >= self.num:
            raise ValueError(f"shared_by {by} is not one of num {self.num} blocks; give 0 to {self.num - 1}")
        if self.alone is not None and self.shared == "trained":
            raise ValueError(f"shared trained would give alone {self.alone} shared parts that no other block has; set "
                             f"blocks.shared to frozen or with-block")
        reads = self.shared == "with-block" and self.alone not in (None, by)
        if reads and self.shared_from is None:
            raise ValueError(f"alone {self.alone} needs the shared parts that block {by} trains (shared_by); train "
                             "that one first, and set blocks.shared_from to its run")
        if self.shared_from is not None and not reads:
            raise ValueError(f"shared_from {self.shared_from} is for shared with-block and a block alone that is not "
                             f"shared_by; leave it out")
        return self

    @property
    def held(self) -> tuple[int, ...]:
        """The blocks that there are on this machine."""
        return tuple(range(self.num)) if self.alone is None else (self.alone,)

    def trains_shared(self, block: int) -> bool:
        """True if what a block shares with others, or has beside the core, learns while it is at work."""
        return self.shared == "trained" or (self.shared == "with-block" and block == self.shared_by)

    def split(self, num_core_layers: int) -> tuple[int, ...]:
        """Layers of each block of a core that has so many in all."""
        return self.layers or (num_core_layers // self.num,) * self.num


def check_blocks(config: Any) -> None:
    """Raises ValueError where the blocks of a whole config do not go with its model or its training rule."""
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
                     f"to {ways}, or say with blocks.layers how many each has")


def _check_alone(config: Any) -> None:
    alone = config.blocks.alone
    if not config.rule.independent:
        raise ValueError(f"blocks.alone {alone} is for objective blockwise, whose blocks learn without each other, and "
                         f"objective is {config.objective}; leave it out")
    if config.training.sample_every:
        raise ValueError(f"training.sample_every {config.training.sample_every} draws samples by all blocks, and "
                         f"blocks.alone is {alone}; set it to 0")


def check_blockwise(config: Any) -> None:
    """One level for all rows says which block is at work, and nothing may pass from a block to another in training."""
    blocks, denoise, noise = config.blocks, config.denoise, config.denoise.noise
    if blocks.num < 2:
        raise ValueError("objective blockwise trains one of several blocks at a time, and blocks.num is 1; set "
                         "objective to denoise, or blocks.num to 2 or more")
    alone = {"order": "together", "train_steps": 1}
    for name, value in alone.items():
        if getattr(denoise, name) != value:
            raise ValueError(f"denoise.{name} {getattr(denoise, name)} is for one block that knows all noise levels, "
                             f"and objective blockwise has a block for each part of them; set it to {value}")
    if denoise.carry == "latent":
        raise ValueError("denoise.carry latent hands a block's output to another block, which objective blockwise "
                         "never trains; set it to none or estimate")
    if noise.distribution == "adaptive":
        raise ValueError("denoise.noise.distribution adaptive would move the edges between blocks while objective "
                         "blockwise trains them; set it to log-uniform or log-normal")
    if blocks.choose == "mass" and noise.share_at_max == 1:
        raise ValueError("blocks.choose mass with denoise.noise.share_at_max 1.0 trains the first block alone; set "
                         "blocks.choose to uniform")
    if blocks.edges is not None and not noise.sigma_min < blocks.edges[-1] <= blocks.edges[0] < noise.sigma_max:
        raise ValueError(f"blocks.edges {list(blocks.edges)} do not lie between denoise.noise.sigma_min "
                         f"{noise.sigma_min} and denoise.noise.sigma_max {noise.sigma_max}; move them inside")
