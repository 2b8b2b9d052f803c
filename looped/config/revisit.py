"""Settings of states that are kept from a sequence's last visit, from which its next visit goes on."""

from typing import Annotated, Any, Literal

from pydantic import Field

from looped.config.base import Depth, Positive, Section


class RevisitConfig(Section):
    """States kept between the visits to a training sequence, under `full` and `truncated`."""

    keep: bool = Field(
        default=False,
        description="begin at the state that the last visit to the same sequence of text has ended with, detached, so "
                    "that after k epochs its loop is k visits deep at the cost of one (`full`, `truncated`)")
    max_visits: Depth = Field(
        default=8, description="visits after which a sequence begins anew; each runs the loop steps of its rule")
    restart_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.25,
        description="share of the sequences, drawn at random at every step, that begin anew, so that shallow depths "
                    "stay trained")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="dtype of the kept states, one per row of every training sequence, in memory "
                                       "and in checkpoints")
    max_gigabytes: Positive = Field(
        default=4.0,
        description="largest size of the kept states, in GB of 10^9 bytes, above which training is refused")

    @property
    def deepest(self) -> int:
        """The visits of a sequence that may follow on each other."""
        return self.max_visits if self.keep else 1


def check_revisit(config: Any) -> None:
    """Raises ValueError if states are to be kept of what is not met again, or by a rule that cannot."""
    if not config.revisit.keep:
        return
    if not config.kind.meets_again:
        raise ValueError(f"revisit.keep needs sequences that are met again in every epoch, and those of "
                         f"{config.kind.source(config)} are drawn or changed anew; set it to false")
    if config.data.streaming == "endless" or config.data.mixture:
        source = "data.mixture" if config.data.mixture else "data.streaming endless"
        raise ValueError(f"revisit.keep needs the fixed sequences of one text, and {source} has none; set revisit.keep "
                         f"to false, or give the text as data.path")
    if config.recurrence.from_share or config.recurrence.stages:
        stages = "stages" if config.recurrence.stages else f"from_share {config.recurrence.from_share:g}"
        raise ValueError(f"revisit.keep deepens the loop visit by visit, and recurrence.{stages} by the budget; set "
                         f"one of them to its default")
    if config.model.streams > 1:
        raise ValueError(f"revisit.keep keeps one state per row, and model.streams is {config.model.streams}; set one "
                         f"of them to its default")
    if config.training.shard != "none":
        raise ValueError(f"revisit.keep keeps states in one process, and training.shard is {config.training.shard}; "
                         f"set training.shard to none")
