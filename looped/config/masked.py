"""Settings of masked diffusion: tokens of text are masked instead of noised."""

from typing import Any, Literal

from pydantic import Field

from looped.config.base import Section


class MaskedConfig(Section):
    """The masking schedule, and the conditioning of the network on the mask level."""

    schedule: Literal["linear", "cosine"] = Field(
        default="linear",
        description="alpha(t), the fraction of unmasked tokens at time t: 1 - t, or MD4's cosine; sets the training "
                    "distribution of mask levels and the unmasking steps")
    cond_width: int | None = Field(
        default=128, ge=2,
        description="width of the embedding of the mask level (the log-odds of being masked) that conditions the core "
                    "by AdaLN; null: no conditioning on the level")


def check_masked(config: Any) -> None:
    """Raises ValueError for settings that masked diffusion does not support."""
    if config.kind.like not in config.rule.kinds:
        raise ValueError(f"objective masked masks tokens of text, and {config.kind.source(config)} is not text; set "
                         f"objective to denoise, or leave that out")
    blocks = config.blocks
    if blocks.edges is not None or blocks.partition != "mass":
        what = "edges" if blocks.edges is not None else f"partition {blocks.partition}"
        raise ValueError(f"blocks.{what} splits levels of sigma, but objective masked splits alpha into equal "
                         f"decrements; leave it out")
