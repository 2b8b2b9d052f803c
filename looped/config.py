"""Every setting of a run: frozen pydantic models, YAML in and out, and the checks between fields.

Defaults < YAML file < `--section.key value` flags, all validated together by `load_config`. Imports no torch, so that
`looped --help` and the checks of a config are instant.
"""

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from looped.config_base import Count, Depth, Fraction, NonNegative, Positive, Section
from looped.config_blocks import BlocksConfig, check_blocks
from looped.config_data import DataConfig, TaskConfig
from looped.config_denoise import DenoiseConfig, check_layout, noise_preset
from looped.config_images import ImageConfig, check_generator
from looped.config_local import NOPROP, ForwardForwardConfig, NoPropConfig, check_local
from looped.config_masked import MaskedConfig, check_masked
from looped.config_rules import FixedPointConfig, SupervisionConfig
from looped.errors import UserError, did_you_mean


class ModelConfig(Section):
    """The network: prelude, weight-tied core, coda."""

    width: int = Field(128, ge=2, description="width D of the residual stream")
    num_heads: int = Field(4, ge=1, description="query heads H")
    num_kv_heads: int | None = Field(None, ge=1, description="key and value heads; null means num_heads")
    ffn_width: int | None = Field(None, ge=1, description="hidden width of SwiGLU; null means 4 * width")
    num_prelude_layers: Count = Field(1, description="layers before the loop")
    num_core_layers: Depth = Field(2, description="layers inside the loop, over all its blocks")
    num_coda_layers: Count = Field(1, description="layers after the loop")
    block: Literal["prenorm", "sandwich"] = Field("prenorm", description="sandwich: Huginn's second norm, on the sum")
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys before the rotation")
    rope_base: Positive = Field(10_000.0, description="base of the rotary frequencies")
    norm_eps: Positive = Field(1e-6, description="epsilon of every RMSNorm")
    injection: Literal["none", "add", "linear", "gated", "diagonal"] = Field(
        "linear", description="how the encoded input enters each loop step")
    state_init: Literal["like-init", "zero", "embedding", "noise"] = Field(
        "like-init", description="state before the first loop step (loop objectives)")
    tie_embeddings: bool = Field(True, description="the head is the transposed embedding")
    patch_size: Depth = Field(4, description="side of the square patches that images are cut into, in pixels")
    attention: Literal["auto", "xformers", "sdpa", "flex"] = Field("auto", description="attention backend")

    @model_validator(mode="after")
    def _check_heads(self):
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            step = 2 * self.num_heads
            low = max(step, self.width // step * step)
            raise ValueError(f"width {self.width} does not split into num_heads {self.num_heads} heads of even size; "
                             f"try {low} or {low + step}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                             f"try {self.num_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def hidden(self) -> int:
        return self.ffn_width or 4 * self.width


class RecurrenceConfig(Section):
    """How often the core runs under `full`, `truncated` and `progressive`."""

    mean: Depth = Field(8, description="mean number of loop steps; `full` runs exactly this many, `progressive` at "
                                       "most")
    backprop: Depth = Field(4, description="last steps that carry gradient under `truncated`")
    distribution: Literal["huginn", "fixed"] = Field("huginn", description="log-normal Poisson, or always `mean`")
    per_sequence: bool = Field(True, description="one depth a sequence (Parcae) instead of one a batch (Huginn)")
    loss_on: Literal["last", "every"] = Field(
        "last", description="the loss is read after the last step, or after every step that carries gradient")
    progressive_weight: Fraction = Field(
        1.0, description="weight of the progressive loss under `progressive`; the rest is that of a full unroll")
    damping: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the old state that a step keeps when problems are solved; 0 is the plain loop")


class OptimConfig(Section):
    """Optimiser, learning-rate schedule, clipping and weight averaging."""

    name: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon for the matrices, AdamW for the rest")
    lr: Positive = Field(2e-3, description="peak learning rate of AdamW")
    muon_lr: Positive = Field(2e-2, description="peak learning rate of Muon")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW's moment decays")
    weight_decay: NonNegative = Field(0.1, description="decoupled decay of matrices; vectors have none")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after warmup: cosine, stable-then-decay, flat")
    warmup_steps: Count = Field(50, description="linear warmup")
    decay_fraction: Fraction = Field(0.2, description="last share of the budget that wsd decays over")
    min_lr_fraction: Fraction = Field(0.1, description="learning rate at the end, as a share of the peak")
    grad_clip: NonNegative = Field(1.0, description="clip the gradient norm here; 0 leaves it alone")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="decay of averaged weights; 0 keeps none")


class TrainingConfig(Section):
    """Budget, batch, precision and what is written how often."""

    batch_size: Depth = Field(32, description="sequences an optimiser step, over all processes and micro-batches")
    accumulation: Depth = Field(1, description="micro-batches an optimiser step is split into")
    budget: int = Field(1000, ge=1, description="how much to train, in budget_unit")
    budget_unit: Literal["steps", "tokens", "layer-forwards", "seconds"] = Field(
        "steps", description="unit of the budget")
    clock: Literal["wall", "processor"] = Field(
        "wall", description="seconds of training by the wall, or of the processors (all threads together), which other "
                            "programs on the machine do not lengthen")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs under autocast")
    threads: int | None = Field(None, ge=1, description="CPU threads; null leaves torch's choice")
    log_every: Depth = Field(10, description="steps between lines of metrics.jsonl")
    eval_every: Count = Field(0, description="steps between evaluations; 0 evaluates at the end only")
    num_evals: Count = Field(0, description="evaluations spread evenly over the budget, whatever its unit")
    sample_every: Count = Field(0, description="steps between printed samples, or pictures in samples/; 0 "
                                                "makes none")
    checkpoint_every: Count = Field(200, description="steps between checkpoints; 0 saves at the end only")
    keep_checkpoints: Depth = Field(2, description="newest checkpoints that are kept")
    warm_start: str | None = Field(None, description="a run whose model's weights are taken over before the first step")
    checkpoint_activations: bool = Field(
        False, description="keep each layer's input alone for backward, which runs the layer again: less memory for a "
                           "third more time, the same gradients; rows that a cache keeps (concat) are left as they are")
    compile: bool = Field(False, description="torch.compile the loop step (never the loop)")
    wandb: Literal["off", "online", "offline"] = Field("off", description="Weights & Biases beside metrics.jsonl")


class EvaluationConfig(Section):
    """How held-out text is measured, and what the samples of `training.sample_every` are."""

    depths: tuple[Depth, ...] = Field((1, 2, 4, 8, 16, 32, 64), min_length=1,
                                      description="loop or solver steps that `looped eval` measures")
    sample_depths: tuple[Depth, ...] = Field((1, 4), min_length=1, description="those of the samples while training")
    num_sequences: Depth = Field(64, description="held-out sequences")
    levels: Depth = Field(32, description="levels that each is read at for the bound of `masked`, evenly spread")
    batch_size: Depth = Field(16, description="sequences at once")
    num_samples: Depth = Field(2, description="texts generated at each depth, or images of each class")
    sample_length: Depth = Field(64, description="tokens a generated text")
    prompt_length: Depth = Field(16, description="held-out tokens it continues")
    difficulties: tuple[Count, ...] = Field((), description="levels of a task to measure; none given: the task's own")
    num_problems: Depth = Field(256, description="held-out problems of each level")
    trajectories: Depth = Field(1, description="solver trajectories of a denoiser that an answer is made from")
    choose: Literal["mean", "consistent"] = Field(
        "mean", description="of several: the likeliest under their mean readout, or the one that the denoiser, shown "
                            "it noised afresh, is surest of")
    guidance: NonNegative = Field(
        1.0, description="classifier-free guidance of generated images: 1 is the plain class, above it more of what "
                         "sets the class apart, 0 any class")
    num_images: Depth | None = Field(
        None, description="images generated at each depth to be held against the held-out ones; null: as many")


class Config(Section):
    """A whole run."""

    objective: Literal["full", "truncated", "progressive", "one-step", "fixed-point", "denoise", "blockwise", "masked",
                       "noprop-dt", "noprop-ct", "noprop-fm", "forward-forward", "ar"] = Field(
        "denoise", description="training rule; ar: the same layers without a loop, the yardstick of the others")
    seed: Count = Field(0, description="with the step number, it decides all randomness and the order of the data")
    model: ModelConfig = ModelConfig()
    recurrence: RecurrenceConfig = RecurrenceConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    fixed_point: FixedPointConfig = FixedPointConfig()
    denoise: DenoiseConfig = DenoiseConfig()
    masked: MaskedConfig = MaskedConfig()
    blocks: BlocksConfig = BlocksConfig()
    noprop: NoPropConfig = NoPropConfig()
    forward_forward: ForwardForwardConfig = ForwardForwardConfig()
    task: TaskConfig = TaskConfig()
    images: ImageConfig = ImageConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check_across(self):
        if self.training.batch_size % self.training.accumulation:
            raise ValueError(f"training.batch_size {self.training.batch_size} does not split into "
                             f"training.accumulation {self.training.accumulation} equal micro-batches")
        if self.denoise.target.tied and self.denoise.target.dim not in (None, self.model.width):
            raise ValueError(f"denoise.target.tied needs denoise.target.dim = model.width; leave denoise.target.dim "
                             f"out, or set it to {self.model.width}")
        if self.is_task and self.is_images:
            raise ValueError(f"task.name {self.task.name} and images.source {self.images.source} are both set; keep "
                             f"one of them")
        self._check_loss()
        if self.denoises:
            check_layout(self.denoise, text=not (self.is_task or self.is_images), images=self.is_images,
                         full=self.sees_all)
        check_blocks(self)
        check_local(self)
        check_masked(self)
        if self.generates:
            check_generator(self)
        if self.denoise.block_size > 1 and self.model.injection == "none":
            raise ValueError("denoise.block_size above 1 needs an injection, which tells the core where in its block "
                             "a row stands; set model.injection to linear, add, gated or diagonal")
        if self.data.length % self.denoise.block_size:
            size = self.denoise.block_size
            raise ValueError(f"data.length {self.data.length} does not split into blocks of denoise.block_size {size}; "
                             f"try {max(1, self.data.length // size) * size}")
        if self.evaluation.prompt_length >= self.data.length:
            raise ValueError(f"evaluation.prompt_length {self.evaluation.prompt_length} leaves nothing of "
                             f"data.length {self.data.length} to continue; try {self.data.length // 2}")
        return self

    def _check_loss(self):
        """Which rules can read their loss after every step."""
        recurrence, rule = self.recurrence, self.objective
        if recurrence.loss_on != "every":
            return
        if rule == "truncated" and recurrence.per_sequence and recurrence.distribution == "huginn":
            raise ValueError("recurrence.loss_on every needs one depth for the whole batch; set "
                             "recurrence.per_sequence to false, or recurrence.distribution to fixed")
        if rule in ("one-step", "fixed-point"):
            where = "after each segment" if rule == "one-step" else "at the fixed point"
            raise ValueError(f"recurrence.loss_on every is not for {rule}, whose loss is read {where}; set it to last")

    @property
    def is_task(self) -> bool:
        """Whether problems of a task are trained, not text."""
        return self.task.name is not None

    @property
    def denoises(self) -> bool:
        """Whether the model is a denoiser, whose depth is that of a solver."""
        return self.objective in ("denoise", "blockwise")

    @property
    def is_noprop(self) -> bool:
        """Whether the embedding of an image's class is denoised, block by block or at any time."""
        return self.objective in NOPROP

    @property
    def has_levels(self) -> bool:
        """Whether the core is told a noise level, or a time."""
        return self.denoises or self.objective in ("noprop-ct", "noprop-fm")

    @property
    def one_block_a_step(self) -> bool:
        """Whether an optimiser step trains one of several blocks of the core."""
        several = self.objective == "masked" and self.blocks.num > 1
        return several or self.objective in ("blockwise", "noprop-dt")

    @property
    def is_images(self) -> bool:
        """Whether images are trained on: their classes, or they themselves."""
        return self.images.source is not None

    @property
    def generates(self) -> bool:
        """Whether images are made, not named."""
        return self.images.goal == "generate"

    @property
    def sees_all(self) -> bool:
        """Whether every row sees every other, not only those before it."""
        return self.is_images or (self.is_task and self.task.layout == "full") or self.objective == "masked"

    @property
    def single_pass(self) -> bool:
        """Whether a training step goes through the core (or a block of it) once, however deep the model is run later.
        """
        return self.denoises or self.is_noprop or self.objective in ("masked", "ar")

    @property
    def cond_width(self) -> int | None:
        """The width of the vector that tells the core its level; None where it is not told."""
        if self.objective == "masked":
            return self.masked.cond_width
        return self.denoise.cond_width if self.has_levels else None

    @property
    def main_depth(self) -> int:
        """The depth that stands for the trained ones: their mean (their most, under `progressive` and `fixed-point`),
        one pass through all blocks where training is `single_pass`, or all layers under `forward-forward`."""
        if self.objective == "one-step":
            return self.supervision.segments * (self.supervision.steps + 1)
        if self.objective == "fixed-point":
            return self.fixed_point.max_steps
        if self.objective == "forward-forward":
            return self.model.num_core_layers
        return self.blocks.num if self.single_pass else self.recurrence.mean

    @property
    def block_layers(self) -> tuple[int, ...]:
        """Layers of each block of the core."""
        return self.blocks.split(self.model.num_core_layers)

    @property
    def step_layers(self) -> float:
        """Layers of the core that a loop step runs: a mean over its blocks."""
        return self.model.num_core_layers / self.blocks.num

    def replace(self, **flags: Any) -> "Config":
        """A validated copy; `config.replace(**{"model.width": 64, "objective": "full"})`."""
        return _validate(_merge(self.model_dump(mode="json"), flags), source="replace()")


def load_config(path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> Config:
    """Defaults, then the YAML file, then the flags (dotted names to values, strings parsed as YAML).

    Raises `UserError` with one sentence: the setting, its value, the way out.
    """
    values: Any = {}
    if path is not None:
        values = _read_yaml(Path(path))
    parsed = {name: parse_flag(name, value) for name, value in (flags or {}).items()}
    return _validate(_merge(values, parsed), source=str(path or "flags"))


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def describe_settings() -> list[tuple[str, str, str]]:
    """(dotted name, default, description) of every setting, for `--help` and the docs."""
    return list(_describe(Config, ""))


def _describe(section: type[Section], prefix: str):
    for name, field in section.model_fields.items():
        if isinstance(field.default, Section):
            yield from _describe(type(field.default), f"{prefix}{name}.")
        else:
            default = yaml.safe_dump(_plain(field.default), default_flow_style=True).split("\n")[0]
            yield f"{prefix}{name}", default, field.description or ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"config {path} is not YAML{f' (line {mark.line + 1})' if mark else ''}: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config {path} holds a {type(values).__name__}, not settings; start from one in configs/")
    return values


def parse_flag(name: str, value: Any) -> Any:
    """What a flag's text means, read as YAML. Raises UserError."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--{name} {value!r} is not a YAML value; quote it") from None


def _merge(values: Mapping, flags: Mapping[str, Any]) -> dict:
    """A copy of the nested values with each dotted flag set."""
    merged = {key: _merge(value, {}) if isinstance(value, Mapping) else value for key, value in values.items()}
    for name, value in flags.items():
        *sections, key = name.split(".")
        target = merged
        for depth, section in enumerate(sections):
            inner = target.setdefault(section, {})
            if isinstance(inner, str) and ".".join(sections[: depth + 1]) == "denoise.noise":
                inner = dict(noise_preset(inner))  # a preset with one setting changed
            if not isinstance(inner, dict):
                raise UserError(f"--{name}: '{section}' is set to {inner!r} in the config, not to a section")
            target[section] = inner
            target = inner
        target[key] = value
    return merged


def _validate(values: Mapping, source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    problem = problems[0]
    location = [part for part in problem["loc"] if not str(part).startswith("function-")]
    name = ".".join(str(part) for part in location)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown setting '{name}'{did_you_mean(str(location[-1]), _known_names(location[:-1]))}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = "" if problem["type"] == "value_error" else f" (got {_shorten(problem['input'])})"
    return f"{name}: {message}{got}{more}" if name else f"{message}{more}"


def _known_names(location: Sequence) -> list[str]:
    section: Any = Config
    for part in location:
        annotation = section.model_fields[part].annotation
        options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        section = next(option for option in options if isinstance(option, type) and issubclass(option, Section))
    return list(section.model_fields)


def _shorten(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
