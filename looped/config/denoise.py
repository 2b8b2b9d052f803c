"""Settings of single-pass denoising: noise levels, targets, context, blocks, readout, solver; and their presets."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from looped.config.base import Depth, Finite, Fraction, NonNegative, Positive, Section, named_or_path
from looped.errors import UserError, did_you_mean

SOLVERS = ("euler", "heun", "dpmpp-2m", "ancestral", "restart")

NOISE_PRESETS: dict[str, dict[str, Any]] = {
    # Shing et al. (DiffusionBlocks), section 4: the EDM settings of Karras et al. 2022, table 1.
    "paper": {"distribution": "log-normal", "log_mean": -1.2, "log_std": 1.2, "sigma_min": 0.002, "sigma_max": 80.0,
              "share_at_max": 0.0},
    "wide": {},  # the defaults of NoiseConfig
}

DENOISE_PRESETS: dict[str, dict[str, Any]] = {
    # The arm `denoise:paper` of a comparison: the published recipe, without the additions of this toolkit.
    "paper": {"denoise.noise": "paper", "denoise.posterior": False, "denoise.weight": "edm", "denoise.bridge": "soft",
              "denoise.solver": "euler", "denoise.target.tied": True, "denoise.target.normalise": "l2",
              "denoise.target.dim": None, "denoise.target.sigma_data": 0.5},
}


def noise_preset(value: Any) -> Any:
    """The settings of a preset given by name; any other value unchanged."""
    if not isinstance(value, str):
        return value
    if value not in NOISE_PRESETS:
        raise UserError(f"unknown noise preset '{value}'{did_you_mean(value, NOISE_PRESETS)}")
    return NOISE_PRESETS[value]


class NoiseConfig(Section):
    """Training distribution of the noise level, and the range that solvers cover."""

    distribution: Literal["log-normal", "log-uniform", "adaptive"] = Field(
        default="log-uniform", description="density of ln sigma in training")
    log_mean: Finite = Field(default=0.7, description="mean of ln sigma (log-normal)")
    log_std: Positive = Field(default=1.2, description="standard deviation of ln sigma (log-normal)")
    sigma_min: Positive = Field(default=0.5, description="lowest noise level")
    sigma_max: Positive = Field(default=20.0, description="highest noise level, where solvers start")
    share_at_max: Fraction = Field(default=0.75, description="fraction of the sequences trained at sigma_max itself")

    @model_validator(mode="after")
    def _check_range(self):
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} is not below sigma_max {self.sigma_max}; "
                             f"swap them or widen the range")
        return self


class TargetConfig(Section):
    """The clean vectors y that are denoised: one row per token."""

    dim: int | None = Field(
        default=None, ge=1,
        description="dimension of the target embedding; null: 16, or that of the input embedding if tied")
    normalise: Literal["rms", "l2"] = Field(default="rms", description="rows of unit RMS, or of unit norm (paper)")
    scale: Positive = Field(default=1.0, description="factor on the normalised rows")
    tied: bool = Field(default=False, description="take the rows from the model's input embedding")
    sigma_data: Positive | None = Field(
        default=None,
        description="standard deviation per coordinate assumed by the preconditioning; null: the true one")
    learned_logit_scale: bool = Field(default=True, description="learn the sharpness of the readout")


class DenoiseConfig(Section):
    """Single-pass denoising: context, noise, targets, readout, and the solver used by default."""

    context: Literal["inject", "concat", "context"] = Field(
        default="context",
        description="clean tokens reach the noisy rows by injection, as a clean copy of the sequence, or as keys and "
                    "values of the prelude's output")
    block_size: Depth = Field(
        default=1, description="tokens denoised together by one solve; above 1 with concat or context")
    order: Literal["together", "left-to-right", "confidence"] = Field(
        default="together",
        description="denoising order within a block, the same in training and solver: all tokens together; left to "
                    "right, one by one with a solver of block_size steps; or, for a task, the most confident cells "
                    "first")
    settle_above: Fraction = Field(
        default=1.0,
        description="under order confidence, cells with a confidence above this are fixed at once, in addition to the "
                    "fraction that each step fixes; 1 disables this")
    settled: Literal["random", "surest"] = Field(
        default="random",
        description="under order confidence, the cells given as fixed in training: a random fraction; or, in half of "
                    "the steps, the most confident ones of a first evaluation without gradient, as in a solver")
    noise: Annotated[NoiseConfig, BeforeValidator(noise_preset)] = Field(
        default=NoiseConfig(), description="noise levels, or a preset: paper, wide")
    target: TargetConfig = Field(default=TargetConfig(), description="target embedding")
    weight: Literal["none", "edm"] = Field(default="none", description="weight of the loss by noise level")
    train_steps: Depth = Field(
        default=1, description="solver steps K per training step, with gradient through all of them")
    train_steps_drawn: bool = Field(
        default=False,
        description="draw the number of trained steps from 1 to `denoise.train_steps` at every optimiser step, so that "
                    "steps at many levels follow each other in training")
    path: Literal["estimate", "truth"] = Field(
        default="estimate",
        description="z of the later trained steps: moved towards the network's own soft estimate, as in a solver; or "
                    "towards the truth, so that it stays the truth with noise, as in the bound by which text is "
                    "measured")
    carry: Literal["none", "estimate", "latent"] = Field(
        default="none",
        description="passed from one solver step to the next along with z: the soft estimate (self-conditioning), or "
                    "the core's output, under `blockwise` that of the blocks above; with concat or context")
    posterior: bool = Field(
        default=True, description="add z . y_v / sigma^2, the exact log-likelihood of z, to the logits")
    evidence_in: bool = Field(
        default=False, description="add to the state the expected input embedding under the likelihood of z alone")
    cond_width: int = Field(default=128, ge=2, description="width of the noise-level embedding")
    bridge: Literal["soft", "hard", "top-k", "sampled"] = Field(
        default="sampled", description="map from logits to embeddings")
    bridge_top_k: Depth = Field(default=8, description="rows kept by the top-k bridge")
    solver: Annotated[str, named_or_path(SOLVERS)] = Field(
        default="ancestral",
        description=f"default solver: {', '.join(SOLVERS)}, or the dotted path of a custom one; with "
                    f"the sampled bridge, ancestral steps are exact for an exact denoiser")
    restart_level: Positive | None = Field(
        default=None,
        description="noise level that the restart solver returns to; null: the geometric mean of the first and last "
                    "level")
    start: Literal["noise", "zero"] = Field(
        default="noise",
        description="start of the solver: pure noise gives samples, zero gives their mean, for decisions; of several "
                    "trajectories only the first starts from zero, as the others would equal it")
    context_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="fraction of the images that training hides, with one learned row in place of all of theirs, so "
                    "that guidance can be used")
    guidance: NonNegative = Field(
        default=1.0,
        description="classifier-free guidance: w in u + w (c - u) at each solver step, with u predicted without the "
                    "image (without its class, under images.goal generate) and c with it; 1 needs one network "
                    "evaluation")
    schedule: Literal["karras", "quantile", "log-linear"] = Field(
        default="quantile", description="default noise schedule")

    @model_validator(mode="after")
    def _check_block(self):
        if self.block_size > 1 and self.context == "inject":
            raise ValueError(f"block_size {self.block_size} needs the clean tokens as a separate context, which "
                             f"context inject does not keep; set denoise.context to concat or context")
        if self.order == "left-to-right" and self.block_size == 1:
            raise ValueError(f"order {self.order} needs a block of several tokens; set denoise.block_size to 2 or more")
        if self.order != "together" and self.solver != "ancestral":
            raise ValueError(f"order {self.order} needs the ancestral solver, and denoise.solver is {self.solver}; set "
                             f"it to ancestral")
        if self.settled == "surest" and self.order != "confidence":
            raise ValueError(f"settled surest needs order confidence, and order is {self.order}; set denoise.order to "
                             f"confidence, or denoise.settled to random")
        if self.order != "together" and self.train_steps > 1:
            raise ValueError(f"order {self.order} is trained one step at a time, and denoise.train_steps is "
                             f"{self.train_steps}; set it to 1")
        if self.train_steps_drawn and self.train_steps == 1:
            raise ValueError("train_steps_drawn draws from 1 to denoise.train_steps, which is 1; set that to 2 or "
                             "more, or denoise.train_steps_drawn to false")
        return self


def check_guidance(config: Any) -> None:
    """Raises ValueError if guidance needs predictions without a condition that training never hides."""
    guidance, (setting, what) = config.denoise.guidance, config.kind.hidden
    if guidance != 1 and not config.value(setting):
        raise ValueError(f"denoise.guidance {guidance} needs predictions without {what}, which the model does not "
                         f"learn with {setting} 0; set {setting} to 0.1, or denoise.guidance to 1")


def check_layout(config: Any) -> None:
    """Raises ValueError if the denoising settings do not fit the kind of data and its attention pattern."""
    denoise, kind, full = config.denoise, config.kind, config.sees_all
    if full and denoise.context != "inject":
        raise ValueError(f"denoise.context {denoise.context} needs causal attention, but {kind.because}; set "
                         f"denoise.context to inject")
    if denoise.context != "inject" and config.model.core is not None:
        raise ValueError(f"denoise.context {denoise.context} lets noisy rows attend to clean ones in every layer, and "
                         f"model.core {config.model.core} has no such layers; set denoise.context to inject")
    if denoise.context_dropout and not kind.drops_context:
        raise ValueError(f"denoise.context_dropout {denoise.context_dropout} hides images in training, and this config "
                         f"has none; set images.source, or denoise.context_dropout to 0")
    if denoise.block_size > 1 and not kind.writes_blocks:
        raise ValueError(f"denoise.block_size {denoise.block_size} is for text; the answer to a task or an image is "
                         f"predicted as a whole; leave it at 1")
    if denoise.order == "confidence" and not (kind.settles_cells and full):
        raise ValueError("denoise.order confidence fixes the cells of a task one after another; it needs task.name, "
                         "and task.layout full")
    if denoise.carry != "none" and denoise.context == "inject" and not full:
        raise ValueError(f"denoise.carry {denoise.carry} needs noisy rows that no other row attends to, but under "
                         f"context inject others do; set denoise.context to concat or context")
