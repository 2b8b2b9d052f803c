"""Arms: what a benchmark or a comparison sets side by side, an objective with settings of its own, written as text.

    ar, truncated, denoise:concat, denoise:paper, denoise denoise.context=concat model.width=96

An objective, a variant of it after a colon, then settings after spaces. Imports no torch.
"""

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from looped.config import Config, parse_flag
from looped.config_denoise import DENOISE_PRESETS, DenoiseConfig
from looped.errors import UserError, did_you_mean

OBJECTIVES: tuple[str, ...] = typing.get_args(Config.model_fields["objective"].annotation)
VARIANTS: dict[str, dict[str, Any]] = {
    **{context: {"denoise.context": context}
       for context in typing.get_args(DenoiseConfig.model_fields["context"].annotation)},
    **DENOISE_PRESETS,
}
ARMS = (*OBJECTIVES, *(f"denoise:{variant}" for variant in VARIANTS))
SHARED = ("objective", "seed", "task", "images", "data", "evaluation", "training.budget", "training.budget_unit",
          "training.clock")
"""Settings, or sections of them, in which arms may not differ: the objective is named first, the rest makes them
comparable."""


@dataclass(frozen=True)
class Arm:
    """`name`: its text; `slug`: the same for a file's name, and no other arm's; `config`: what it stands for."""

    name: str
    slug: str
    config: Config


def parse_arms(config: Config, text: str) -> list[Arm]:
    """The arms of a comma-separated list, as changes to `config`. Raises UserError."""
    arms: list[Arm] = []
    for part in split_arms(text):
        arm = parse_arm(config, part, taken=[arm.slug for arm in arms])
        if arm.name in [other.name for other in arms]:
            raise UserError(f"arm '{arm.name}' is listed twice; list it once")
        arms.append(arm)
    return arms


def split_arms(text: str) -> list[str]:
    """The texts of the arms: a comma inside brackets is part of a value. Raises UserError where one is empty."""
    parts = [" ".join(part.split()) for part in re.split(r",(?![^\[{]*[\]}])", text)]
    if not all(parts):
        raise UserError(f"--objectives {text!r} has an empty place; known names: {', '.join(ARMS)}")
    return parts


def parse_arm(config: Config, text: str, *, taken: typing.Collection[str] = ()) -> Arm:
    """One arm; its slug is none of those `taken`. Raises UserError."""
    name, *settings = text.split()
    if name not in ARMS:
        raise UserError(f"objective '{name}' is unknown{did_you_mean(name, ARMS)}")
    objective, _, variant = name.partition(":")
    flags = {"objective": objective} | (VARIANTS[variant] if variant else {}) | dict(map(_setting, settings))
    slug = base = re.sub(r"[^A-Za-z0-9.=]+", "-", text).strip("-")[:60]
    number = 2
    while slug in taken:
        slug, number = f"{base}-v{number}", number + 1
    return Arm(" ".join([name, *settings]), slug, _changed(config, text, flags))


def _setting(word: str) -> tuple[str, Any]:
    name, equals, value = word.removeprefix("--").partition("=")
    if not equals or not value:
        raise UserError(f"'{word}' is not a setting of an arm; write it as denoise.context=concat, without spaces")
    for shared in SHARED:
        if name == shared or name.startswith(f"{shared}."):
            raise UserError(f"an arm cannot set {name}, which all arms share; set it for all of them")
    return name, parse_flag(name, value)


def _changed(config: Config, text: str, flags: Mapping[str, Any]) -> Config:
    try:
        return config.replace(**flags)
    except UserError as error:
        raise UserError(f"arm '{text}': {str(error).removeprefix('replace(): ')}") from None
