"""Settings without effect in a config, and the reason: the one place that knows which runs read which settings.

A setting that nothing reads is silently lost: `--objective full --denoise.noise paper` trains what `--objective full`
trains. The table of readers is tested against the settings that building and training read, and against the effect of
changing each. A notice is given for explicit requests: flags of a command, and settings of an arm of a comparison. A
YAML file may serve several objectives, so its unread settings are only listed, by `looped train --dry-run` and
`looped info`.

Imports no torch.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from looped.config import Config
from looped.config.arms import Arm
from looped.config.base import Section
from looped.config.data import SourceConfig
from looped.config.data_kinds import KINDS
from looped.config.rules import RANDOM_STARTS, RULES


@dataclass(frozen=True)
class Readers:
    """The condition for reading some settings or sections: `read(config)` is True if they are read; `where(config)`
    names the condition under which they are not, in terms of the config."""

    settings: tuple[str, ...]
    read: Callable[[Config], bool]
    where: Callable[[Config], str]


def _where(settings: Sequence[str], name: str, *values: Any) -> Readers:
    """Settings that are read if the setting `name` has one of `values`."""
    return Readers(tuple(settings), lambda config: config.value(name) in values,
                   lambda config: f"{name} {config.value(name)}")


def _some_stage_draws(config: Config, distribution: str) -> bool:
    return any(part.distribution == distribution for part in config.recurrence.parts)


def _distribution(config: Config) -> str:
    return f"recurrence.distribution {config.recurrence.distribution}"


READERS: tuple[Readers, ...] = (
    _where(["images.label_dropout", "evaluation.num_images"], "images.goal", "generate"),
    _where(["denoise.target.dim", "denoise.target.normalise", "denoise.target.scale", "denoise.target.tied",
            "denoise.target.learned_logit_scale", "denoise.posterior", "denoise.bridge", "denoise.bridge_top_k",
            "model.tie_embeddings"], "images.goal", "classify"),
    Readers(("blocks.overlap", "blocks.choose"), lambda config: config.blocks.num > 1, lambda config: "blocks.num 1"),
    _where(["blocks.shared_by"], "blocks.shared", "with-block"),
    _where(["denoise.noise.log_mean", "denoise.noise.log_std"], "denoise.noise.distribution", "log-normal"),
    Readers(("denoise.path",), lambda config: config.denoise.train_steps > 1, lambda config: "denoise.train_steps 1"),
    _where(["denoise.bridge_top_k"], "denoise.bridge", "top-k"),
    _where(["supervision.explore"], "supervision.update", "segment"),
    _where(["recurrence.gate_entropy"], "recurrence.loss_on", "gate"),
    _where(["recurrence.distil_weight", "recurrence.distil_temperature"], "recurrence.loss_on", "distil"),
    _where(["revisit.max_visits", "revisit.restart_share", "revisit.dtype", "revisit.max_gigabytes"], "revisit.keep",
           True),
    _where(["model.injection"], "model.core", None),
    Readers(("model.stream_mixing",), lambda config: config.model.streams > 1, lambda config: "model.streams 1"),
    Readers(("model.loop_scale",), lambda config: config.main_depth > 1,
            lambda config: "a trained depth of one step"),
    _where(["model.state_std"], "model.state_init", *RANDOM_STARTS, "vector"),
    Readers(("domain.options",), lambda config: config.domain.name is not None, lambda config: "domain.name null"),
    Readers(("recurrence.quantile",), lambda config: _some_stage_draws(config, "huginn"), _distribution),
    Readers(("recurrence.depths",), lambda config: _some_stage_draws(config, "listed"), _distribution),
    _where(["denoise.restart_level"], "denoise.solver", "restart"),
    _where(["denoise.settle_above"], "denoise.order", "confidence"),
    _where(["denoise.schedule"], "denoise.order", "together", "left-to-right"),
    _where(["fixed_point.phantom_steps", "fixed_point.tau"], "fixed_point.gradient", "phantom"),
    _where(["fixed_point.head_start_weight"], "fixed_point.head_start", "pass"),
    _where(["noprop.dim"], "noprop.embedding", "learned"),
    _where(["images.randaugment_ops", "images.randaugment_magnitude"], "images.randaugment", True),
    Readers(("data.dataset_config", "data.split", "data.streaming"), lambda config: config.data.dataset is not None,
            lambda config: "data.mixture" if config.data.mixture else "data.dataset null"),
    Readers(("task.per_problem",), lambda config: len(set(config.task.difficulty or (0, 1))) > 1,
            lambda config: f"task.difficulty {list(config.task.difficulty or ())}"),
    _where(["data.heldout_bytes"], "data.streaming", "endless"),
    _where(["data.vocab_size"], "data.tokenizer", None),
    _where(["data.heldout", "data.max_bytes", "data.vocab_size", "data.cache_dir"], "data.streaming", False, True),
    _where(["optim.muon_lr"], "optim.name", "muon"),
    _where(["optim.decay_fraction"], "optim.schedule", "wsd"),
    _where(["optim.min_lr_fraction"], "optim.schedule", "cosine", "wsd"),
    Readers(("recurrence.backprop",), lambda config: any(part.backprop <= part.mean or part.distribution != "fixed"
                                                         for part in config.recurrence.parts),
            lambda config: f"recurrence.mean {config.recurrence.mean}, beyond which there are no steps"),
    Readers(("evaluation.choose",), lambda config: config.evaluation.trajectories > 1,
            lambda config: f"evaluation.trajectories {config.evaluation.trajectories}"),
    Readers(("evaluation.trajectories", "evaluation.choose"), lambda config: not config.rule.alike(config),
            lambda config: config.rule.alike(config)),
)
"""Settings whose effect depends on other settings. The settings of rules and kinds of data are in their own tables. A
setting is read if all entries for it or its section allow it; one without entries is always read."""

OF_RULES, OF_KINDS = ({name for each in table.values() for name in each.reads} for table in (RULES, KINDS))
"""Settings or sections that only some rules read, and those that only some kinds of data read."""


def not_read_under(config: Config, name: str) -> str:
    """The condition under which a setting or section is not read, as `objective full`; "" if it is read."""
    if _is_among(name, OF_RULES) and not _is_among(name, config.rule.reads):
        return f"objective {config.objective}"
    if _is_among(name, OF_KINDS) and not _is_among(name, config.kind.reads):
        return config.kind.source(config)
    for readers in READERS:
        if _is_among(name, readers.settings) and not readers.read(config):
            return readers.where(config)
    return ""


def _is_among(name: str, settings: Iterable[str]) -> bool:
    """True if a setting or section is one of `settings`, or lies in one of them."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in settings)


def unread(config: Config, names: Iterable[str]) -> dict[str, str]:
    """Name -> the condition under which it is not read, for settings without effect that are not at their defaults."""
    defaults, names = Config(), list(names)
    changed = [name for name in dict.fromkeys(map(setting_of, names)) if config.value(name) != defaults.value(name)]
    found = {name: not_read_under(config, name) for name in changed}
    of_sources = {} if found.get("data.mixture") else {name: under for name, under in _unread_of_sources(config).items()
                                                       if _is_among(name, names)}
    return {name: under for name, under in (found | of_sources).items() if under}


def _unread_of_sources(config: Config) -> dict[str, str]:
    """Settings of datasets that a source of the mixture without one has, as `unread` gives them."""
    return {f"data.mixture.{source}.{name}": f"data.mixture.{source}.dataset null"
            for source, settings in config.data.mixture.items() if settings.dataset is None
            for name in ("dataset_config", "split")
            if getattr(settings, name) != SourceConfig.model_fields[name].default}


def setting_of(name: str) -> str:
    """The setting in which the value of a dotted name lies: `data.mixture` of `data.mixture.web.weight`."""
    parts, section = name.split("."), Config()
    for place, part in enumerate(parts, start=1):
        section = getattr(section, part)
        if not isinstance(section, Section):
            return ".".join(parts[:place])
    return name


def set_names(config: Config) -> list[str]:
    """The dotted names of all settings that are not at their defaults."""
    return list(_set_names(config, Config(), ""))


def _set_names(section: Section, default: Section, prefix: str) -> Iterable[str]:
    for name in type(section).model_fields:
        value, usual = getattr(section, name), getattr(default, name)
        if isinstance(value, Section):
            yield from _set_names(value, usual, f"{prefix}{name}.")
        elif value != usual:
            yield f"{prefix}{name}"


def sentences(found: Mapping[str, str]) -> list[str]:
    """`denoise.noise, model.patch_size have no effect under objective full`, one sentence per reason."""
    by_reason: dict[str, list[str]] = {}
    for name, under in found.items():
        by_reason.setdefault(under, []).append(name)
    return [f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect under {under}"
            for under, names in by_reason.items()]


def unread_in_file(config: Config, flags: Collection[str]) -> list[str]:
    """Sentences about settings that the run of `config` does not read and that no flag set: those of its file."""
    settings = [setting_of(flag) for flag in flags]
    return sentences(unread(config, [name for name in set_names(config) if not _is_among(name, settings)]))


def steps_of(config: Config) -> int | None:
    """The number of optimiser steps of `training.budget`; None if it depends on more than the config."""
    training = config.training
    if training.budget_unit == "tokens" and "data.length" in config.kind.reads:
        return -(-training.budget // (training.batch_size * config.data.length))
    return training.budget if training.budget_unit == "steps" else None


def num_sequences_of(config: Config) -> int | None:
    """The number of training sequences of `training.budget`; None if it depends on more than the config."""
    steps = steps_of(config)
    return None if steps is None else steps * config.training.batch_size


def short_warmup(config: Config) -> str:
    """A warning that the run ends before its warmup, if its number of steps is known; "" otherwise."""
    warmup, steps = config.optim.warmup_steps, steps_of(config)
    if steps is None or warmup <= steps:
        return ""
    return (f"optim.warmup_steps {warmup} is more than the {steps} steps of training.budget, so that the learning rate "
            f"never reaches its peak; lower the former or raise the latter")


def notice(config: Config, names: Iterable[str]) -> None:
    """Warn about the settings among the explicitly set `names` that have no effect."""
    names = list(names)
    warmup = short_warmup(config) if "optim.warmup_steps" in names else ""
    for each in [*sentences(unread(config, names)), *filter(None, [warmup])]:
        warnings.warn(each, stacklevel=3)


def notice_arms(arms: Sequence[Arm], names: Iterable[str]) -> None:
    """Warn about an arm's own settings that have no effect in it, and about common settings that no arm reads, or that
    an arm's variant sets otherwise."""
    names = list(names)
    for arm in arms:
        for each in sentences(unread(arm.config, arm.own)):
            warnings.warn(f"arm '{arm.name}': {each}", stacklevel=3)
        for name in (each for each in names if each not in arm.own):
            if any(_is_among(each, [name]) for each in arm.variant):
                warnings.warn(f"--{name} has no effect on arm '{arm.name}', whose variant sets it; add {name}=VALUE to "
                              f"the arm", stacklevel=3)
    for name in (each for each in names if all(each in arm.own for arm in arms)):
        warnings.warn(f"--{name} has no effect, since every arm sets it itself", stacklevel=3)
    everywhere = [unread(arm.config, names) for arm in arms]
    nowhere = {name: " and ".join(dict.fromkeys(found[name] for found in everywhere)) for name in everywhere[0]
               if all(name in found for found in everywhere)}
    for each in sentences(nowhere):
        warnings.warn(each, stacklevel=3)
