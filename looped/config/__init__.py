"""Every setting of a run: frozen pydantic models, YAML in and out, and the checks between fields.

Defaults < YAML file < `--section.key value` flags, all validated together by `load_config`. Imports no torch, so that
`looped --help` and the checks of a config are instant.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from looped.config.auto import check_not_in, chosen, over
from looped.config.base import Count, Section
from looped.config.blocks import BlocksConfig
from looped.config.choices import check_choice
from looped.config.data import DataConfig, DomainConfig, TaskConfig
from looped.config.data_kinds import Kind, kind_of
from looped.config.denoise import DenoiseConfig, noise_preset
from looped.config.files import read_yaml, validated
from looped.config.flags import value_of
from looped.config.images import ImageConfig
from looped.config.local_rules import ForwardForwardConfig, NoPropConfig
from looped.config.masked import MaskedConfig
from looped.config.model import ModelConfig
from looped.config.model_families import expanded
from looped.config.recurrence import FixedPointConfig, RecurrenceConfig, SupervisionConfig
from looped.config.removed import without_removed
from looped.config.revisit import RevisitConfig
from looped.config.rules import AUTO, RULES, Rule, rule_of
from looped.config.shipped import config_path
from looped.config.training import EvaluationConfig, OptimConfig, TrainingConfig
from looped.errors import UserError


class Config(Section):
    """All settings of a run."""

    objective: str = Field(
        default="denoise",
        description=f"training rule: {', '.join(RULES)}, or the dotted path of a custom class; ar: the "
                    f"same layers without a loop, the baseline of the others; {AUTO}: the rule and settings that did "
                    f"best in the measurements on text, or on tasks")
    seed: Count = Field(
        default=0, description="seed, together with the step number, of all randomness and the data order")
    model: ModelConfig = ModelConfig()
    recurrence: RecurrenceConfig = RecurrenceConfig()
    revisit: RevisitConfig = RevisitConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    fixed_point: FixedPointConfig = FixedPointConfig()
    denoise: DenoiseConfig = DenoiseConfig()
    masked: MaskedConfig = MaskedConfig()
    blocks: BlocksConfig = BlocksConfig()
    noprop: NoPropConfig = NoPropConfig()
    forward_forward: ForwardForwardConfig = ForwardForwardConfig()
    task: TaskConfig = TaskConfig()
    domain: DomainConfig = DomainConfig()
    images: ImageConfig = ImageConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __init__(self, **values: Any):
        dotted = next((name for name in values if "." in name), None)
        if dotted is not None:
            raise UserError(f"'{dotted}' is a dotted name, and a config is made of sections; write a section in YAML, "
                            f"and in Python load_config(None, {{'{dotted}': ...}}), or config.replace(**{{...}}) alike")
        super().__init__(**values)

    @model_validator(mode="after")
    def _check_across(self):
        if self.training.batch_size % self.training.accumulation:
            raise ValueError(f"training.batch_size {self.training.batch_size} does not split into "
                             f"training.accumulation {self.training.accumulation} equal micro-batches")
        if self.denoise.target.tied and self.denoise.target.dim not in (None, self.model.width):
            raise ValueError(f"denoise.target.tied needs denoise.target.dim = model.width; leave denoise.target.dim "
                             f"out, or set it to {self.model.width}")
        named = [f"{name} {self.value(name)}" for name in ("task.name", "images.source", "domain.name")
                 if self.value(name) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} are {'both' if len(named) == 2 else 'all'} set; keep one of them")
        self.rule.check(self)
        check_choice(self)
        if self.denoise.block_size > 1 and self.model.injection == "none":
            raise ValueError("denoise.block_size above 1 needs an injection, which gives the core a row's position in "
                             "its block; set model.injection to linear, add, gated or diagonal")
        if self.data.length % self.denoise.block_size:
            size = self.denoise.block_size
            raise ValueError(f"data.length {self.data.length} does not split into blocks of denoise.block_size {size}; "
                             f"try {max(1, self.data.length // size) * size}")
        if self.evaluation.prompt_length >= self.data.length:
            raise ValueError(f"evaluation.prompt_length {self.evaluation.prompt_length} leaves nothing of "
                             f"data.length {self.data.length} to continue; try {self.data.length // 2}")
        return self

    @property
    def rule(self) -> Rule:
        """The training rule of `objective`, a row of `looped.config.rules`."""
        return rule_of(self.objective)

    @property
    def kind(self) -> Kind:
        """The kind of data that is trained on, a row of `looped.config.data_kinds`."""
        return kind_of(self)

    @property
    def sees_all(self) -> bool:
        """True if every row attends to every other, not only to earlier ones."""
        return self.rule.sees_all or self.kind.sees_all(self)

    @property
    def cond_width(self) -> int | None:
        """Width of the level embedding that conditions the core; None if there is none."""
        return None if self.rule.told is None else self.value(self.rule.told)

    @property
    def main_depth(self) -> int:
        """The depth that represents the trained depths."""
        return self.rule.depth(self)

    @property
    def sample_depth(self) -> int:
        """The depth of samples if none is asked for: `main_depth`, or, of a solver, which can take any number of steps,
        `recurrence.mean`."""
        return self.recurrence.mean if self.rule.free_depth else self.main_depth

    @property
    def block_layers(self) -> tuple[int, ...]:
        """Number of layers in each block of the core."""
        return self.blocks.split(self.model.num_core_layers)

    @property
    def step_layers(self) -> float:
        """Layer forwards of the core per loop step, a mean over the blocks."""
        return self.model.layer_runs * self.model.num_core_layers / self.blocks.num

    def value(self, name: str) -> Any:
        """The value of the setting with a dotted name."""
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def replace(self, **flags: Any) -> "Config":
        """A validated copy; `config.replace(**{"model.width": 64, "objective": "full"})`."""
        return _validate(_merge(self.model_dump(mode="json"), flags), source="replace()")


def load_config(path: str | Path | None = None, flags: Mapping[str, Any] | None = None, *, auto: bool = True
                ) -> Config:
    """Defaults, then the YAML file, then the flags (dotted names to values, strings as `value_of` reads them). path: a
    file, or the name of a shipped config. auto: `objective auto` may be given; not for a config whose objective others
    replace.

    Raises `UserError` with one sentence: the setting, its value, the fix.
    """
    values: Any = {}
    if path is not None:
        values = read_yaml(config_path(path))
    parsed = {name: parse_flag(name, value) for name, value in (flags or {}).items()}
    merged, source = _merge(values, parsed), str(path or "flags")
    if auto and merged.get("objective") == AUTO:
        settings = chosen(merged)
        if values.get("objective") != AUTO:
            check_not_in(values, parsed, settings, source)
        source += f", with objective auto ({', '.join(f'{name} {value}' for name, value in settings.items())})"
        merged = over(_merge({}, settings), {name: value for name, value in merged.items() if name != "objective"})
    return _validate(merged, source)


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


def parse_flag(name: str, value: Any) -> Any:
    """The value of a flag: a text as `value_of` reads it, any other value as it is. Raises UserError."""
    return value_of(Config, name, value) if isinstance(value, str) else value


def _merge(values: Mapping, flags: Mapping[str, Any]) -> dict:
    """A copy of the nested values with each dotted flag set."""
    merged = {key: _merge(value, {}) if isinstance(value, Mapping) else value for key, value in values.items()}
    for name, value in sorted(expanded(flags).items(), key=lambda item: item[0].count(".")):  # sections go first
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
        target[key] = _merge(value, {}) if isinstance(value, Mapping) else value
    return merged


def _validate(values: Mapping, source: str) -> Config:
    return validated(Config, without_removed(values), source)
