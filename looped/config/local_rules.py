"""Settings of the rules that train an image classifier by local losses: the three of NoProp, and Forward-Forward."""

from typing import Any, Literal

from pydantic import Field, model_validator

from looped.config.base import Depth, Finite, Positive, Section

USUAL_ETA, USUAL_SCHEDULE = {"noprop-dt": 0.1}, {"noprop-ct": "learned"}
"""The paper's `eta` and schedule by rule, if they are not 1 and cosine."""


class NoPropConfig(Section):
    """The embedding of a class that is denoised, its noise, and the solver (Li et al. 2025, arXiv 2503.24322)."""

    embedding: Literal["learned", "one-hot"] = Field(
        default="learned",
        description="the clean vector of a class: learned from an orthogonal initialisation, or fixed, with one "
                    "coordinate per class")
    dim: Depth = Field(default=20, description="dimension of a learned embedding; one-hot has one per class")
    eta: Positive | None = Field(
        default=None,
        description="weight of the denoising loss; null: the paper's, 0.1 under noprop-dt and 1 under the others")
    schedule: Literal["cosine", "learned"] | None = Field(
        default=None,
        description="signal-to-noise ratio over time (unused by flow matching): a cosine, or a learned monotone "
                    "network; null: the paper's, cosine under noprop-dt and learned under noprop-ct")
    log_snr: tuple[Finite, Finite] = Field(
        default=(-7.0, 7.0),
        description="ln of the signal-to-noise ratio at both ends of time; a learned schedule starts from these")
    solver: Literal["euler", "posterior"] = Field(
        default="euler",
        description="solver of noprop-ct: Euler steps along the probability flow, or draws from the posterior, as in "
                    "noprop-dt")

    @model_validator(mode="after")
    def _check_range(self):
        low, high = self.log_snr
        if low >= high:
            raise ValueError(f"log_snr [{low}, {high}] does not increase, but noise must decrease over time; set "
                             f"noprop.log_snr to [{min(low, high)}, {max(low, high) + (low == high)}]")
        return self

    def weight(self, rule: str) -> float:
        """`eta` under a rule."""
        return self.eta or USUAL_ETA.get(rule, 1.0)

    def schedule_of(self, rule: str) -> str:
        """`schedule` under a rule."""
        return self.schedule or USUAL_SCHEDULE.get(rule, "cosine")


class ForwardForwardConfig(Section):
    """Goodness function, threshold and negative examples of Forward-Forward (Hinton 2022, arXiv 2212.13345)."""

    goodness: Literal["mean", "sum"] = Field(
        default="mean",
        description="goodness: mean or sum of the squared coordinates of a row; a layer's log-odds are the goodness "
                    "minus the threshold")
    rows: Literal["class", "all"] = Field(
        default="class",
        description="rows that goodness is computed on: the one that holds the class, or the mean over the patches too")
    threshold: Positive = Field(
        default=2.0,
        description="threshold of goodness, as the mean square of a coordinate; the input of a layer has 1")
    negatives: Literal["uniform", "hard"] = Field(
        default="uniform",
        description="sampling of wrong classes: uniform, or in proportion to how often they are mistaken for the right "
                    "one, for which a training step scores all classes without gradient")


def _check_images(config: Any) -> None:
    if config.images.source is None:
        raise ValueError(f"objective {config.objective} classifies images; set images.source to digits, idx, "
                         f"folder or dataset")


def check_forward_forward(config: Any) -> None:
    """Raises ValueError unless all layers are in the core, each reads only the one before it, and none ends in a norm,
    which would make the goodness constant."""
    _check_images(config)
    alone = {"num_prelude_layers": 0, "num_coda_layers": 0, "core_runs": 1, "injection": "none", "block": "prenorm"}
    for name, value in alone.items():
        found = getattr(config.model, name)
        if found != value:
            raise ValueError(f"model.{name} {found} does not fit objective forward-forward, which trains each layer of "
                             f"the core on the output of the one before; set it to {value}")


def check_noprop(config: Any) -> None:
    """Raises ValueError unless the data are images and every block trains the shared parts."""
    _check_images(config)
    if config.blocks.shared != "trained":
        raise ValueError(f"blocks.shared {config.blocks.shared} is for objective blockwise, and under "
                         f"{config.objective} every block trains the shared parts; set it to trained")


def check_noprop_dt(config: Any) -> None:
    """Raises ValueError unless there is one block per discrete time step."""
    _check_images(config)
    if config.blocks.num < 2:
        raise ValueError("objective noprop-dt has a block for each step in time, and blocks.num is 1; set blocks.num "
                         "to 2 or more, or objective to noprop-ct")
    if config.noprop.schedule == "learned":
        raise ValueError("noprop.schedule learned is for continuous time, and noprop-dt has discrete steps; set it to "
                         "cosine")
