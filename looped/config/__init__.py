"""Every setting of a run: frozen pydantic models, YAML in and out, and the checks between fields.

Defaults < YAML file < `--section.key value` flags, all validated together by `load_config`. Imports no torch, so that
`looped --help` and the checks of a config are instant.
"""

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from looped.config.base import Count, Section
from looped.config.blocks import BlocksConfig, check_blocks
from looped.config.data import DataConfig, TaskConfig
from looped.config.denoise import DenoiseConfig, check_guidance, check_layout, noise_preset
from looped.config.images import ImageConfig, check_generator
from looped.config.masked import MaskedConfig, check_masked
from looped.config.model import ModelConfig
from looped.config.recurrence import FixedPointConfig, RecurrenceConfig, SupervisionConfig
from looped.config.rivals import NOPROP, ForwardForwardConfig, NoPropConfig, check_local
from looped.config.training import EvaluationConfig, OptimConfig, TrainingConfig
from looped.errors import UserError, did_you_mean


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
            check_guidance(self.denoise, self.images.label_dropout, "images.label_dropout", "its class")
        elif self.denoises:
            check_guidance(self.denoise, self.denoise.context_dropout, "denoise.context_dropout", "the image")
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
