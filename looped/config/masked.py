"""Settings of masked diffusion: text whose tokens are hidden one by one instead of blurred."""

from typing import Any, Literal

from pydantic import Field

from looped.config.base import Section


class MaskedConfig(Section):
    """The schedule by which tokens are hidden, and whether the network is told how far that has come."""

    schedule: Literal["linear", "cosine"] = Field(
        "linear", description="alpha(t), the share of tokens that are still seen at time t: 1 - t, or MD4's cosine; "
                              "decides how often `masked` trains each level, and where its unmasking steps are")
    cond_width: int | None = Field(
        128, ge=2, description="width of the embedding of the level, the log-odds of being hidden, that AdaLN tells "
                               "the core; null: it has to see for itself how much is hidden")


def check_masked(config: Any) -> None:
    """Raises ValueError for what masked diffusion does not know."""
    if config.kind.like not in config.rule.kinds:
        raise ValueError(f"objective masked hides tokens of text, and {config.kind.source(config)} is no text; set "
                         f"objective to denoise, or leave that out")
    blocks = config.blocks
    if blocks.edges is not None or blocks.partition != "mass":
        what = "edges" if blocks.edges is not None else f"partition {blocks.partition}"
        raise ValueError(f"blocks.{what} parts levels of sigma, and under objective masked the blocks share alpha in "
                         f"equal decrements; leave it out")
