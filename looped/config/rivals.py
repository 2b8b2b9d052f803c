"""Settings of the rules that teach a classifier of images piece by piece: NoProp's three, and Forward-Forward."""

from typing import Any, Literal

from pydantic import Field, model_validator

from looped.config.base import Depth, Finite, Positive, Section

USUAL_ETA, USUAL_SCHEDULE = {"noprop-dt": 0.1}, {"noprop-ct": "learned"}
"""The paper's, where they are not 1 and a cosine."""


class NoPropConfig(Section):
    """The embedding of a class that is denoised, its noise, and the solver (Li et al. 2025, arXiv 2503.24322)."""

    embedding: Literal["learned", "one-hot"] = Field(
        "learned", description="the clean vector of a class: learned from orthogonal ones on, or fixed, a class a "
                               "coordinate")
    dim: Depth = Field(20, description="numbers of a learned embedding; one-hot has one a class")
    eta: Positive | None = Field(None, description="weight of the denoising loss; null: the paper's, 0.1 under "
                                                   "noprop-dt and 1 under the others")
    schedule: Literal["cosine", "learned"] | None = Field(
        None, description="signal-to-noise ratio over time, which flow matching has none of: a cosine, or a monotone "
                          "network's; null: the paper's, cosine under noprop-dt and learned under noprop-ct")
    log_snr: tuple[Finite, Finite] = Field(
        (-7.0, 7.0), description="ln of the signal-to-noise ratio at either end of time; a learned schedule begins "
                                 "with these")
    solver: Literal["euler", "posterior"] = Field(
        "euler", description="steps of noprop-ct: Euler's along the probability flow, or draws from the posterior, as "
                             "noprop-dt's are")

    @model_validator(mode="after")
    def _check_range(self):
        low, high = self.log_snr
        if low >= high:
            raise ValueError(f"log_snr [{low}, {high}] does not rise, and noise is to fall over time; set "
                             f"noprop.log_snr to [{min(low, high)}, {max(low, high) + (low == high)}]")
        return self

    def weight(self, rule: str) -> float:
        """`eta` under a rule."""
        return self.eta or USUAL_ETA.get(rule, 1.0)

    def schedule_of(self, rule: str) -> str:
        """`schedule` under a rule."""
        return self.schedule or USUAL_SCHEDULE.get(rule, "cosine")


class ForwardForwardConfig(Section):
    """What a layer takes for good, and what it is to take for bad (Hinton 2022, arXiv 2212.13345)."""

    goodness: Literal["mean", "sum"] = Field(
        "mean", description="of the squares of a row's coordinates, as a layer's log-odds beyond the threshold")
    rows: Literal["class", "all"] = Field(
        "class", description="whose squares: those of the row that the class stands in, or the mean over the patches "
                             "too")
    threshold: Positive = Field(2.0, description="mean square of a coordinate that parts good from bad; what enters a "
                                                 "layer has 1")
    negatives: Literal["uniform", "hard"] = Field(
        "uniform", description="wrong classes that are shown: each as often, or as often as they are mistaken for the "
                               "right one, for which a training step tries all classes without gradient")


def _check_images(config: Any) -> None:
    if config.images.source is None:
        raise ValueError(f"objective {config.objective} names what is on images; set images.source to digits, idx, "
                         f"folder or dataset")


def check_forward_forward(config: Any) -> None:
    """All layers are those of the core, each reads the one before it alone, and none ends in a norm, which would leave
    nothing to be good by."""
    _check_images(config)
    alone = {"num_prelude_layers": 0, "num_coda_layers": 0, "injection": "none", "block": "prenorm"}
    for name, value in alone.items():
        found = getattr(config.model, name)
        if found != value:
            raise ValueError(f"model.{name} {found} is not for objective forward-forward, which teaches "
                             f"each layer of the core by what it makes of the one before; set it to {value}")


def check_noprop(config: Any) -> None:
    """Images, and blocks that are all trained."""
    _check_images(config)
    if config.blocks.shared != "trained":
        raise ValueError(f"blocks.shared {config.blocks.shared} is for objective blockwise, and under "
                         f"{config.objective} what blocks share is trained by each of them; set it to trained")


def check_noprop_dt(config: Any) -> None:
    """Steps in time of its own, a block each."""
    _check_images(config)
    if config.blocks.num < 2:
        raise ValueError("objective noprop-dt has a block for each step in time, and blocks.num is 1; set blocks.num "
                         "to 2 or more, or objective to noprop-ct")
    if config.noprop.schedule == "learned":
        raise ValueError("noprop.schedule learned is for continuous time, and noprop-dt has steps of its own; set it "
                         "to cosine")
