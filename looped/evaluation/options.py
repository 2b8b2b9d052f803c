"""Options of `looped eval`, for every kind of data."""

from collections.abc import Sequence
from dataclasses import dataclass

from looped.evaluation.image_features import Features
from looped.evaluation.judge import Reader
from looped.evaluation.mauve import Encoder
from looped.evaluation.sample_quality import Reference
from looped.inference.exits import Exit


@dataclass(frozen=True)
class Options:
    """Options of an evaluation beyond its depths; each domain accepts some of them (`Domain.flags`)."""

    trajectories: int = 0
    probes: bool = False
    twin: Reference | None = None
    match: Reference | None = None
    judge: Reader | None = None
    mauve: Encoder | None = None
    difficulties: Sequence[int] | None = None
    exits: Sequence[Exit] = ()
    features: Features | None = None
    per_token: bool = False
