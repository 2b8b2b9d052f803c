"""Arms: what a benchmark or a comparison sets side by side, an objective with settings of its own, written as text.

    ar, truncated, denoise:concat, denoise:paper, denoise denoise.context=concat model.width=96, wide=ar model.width=96

An objective, a variant of it after a colon, then settings after spaces; before all of it a name of one's own and an
equals sign. Imports no torch.
"""

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from looped.config import Config, parse_flag
from looped.config.denoise import DENOISE_PRESETS, DenoiseConfig
from looped.config.rules import RULES
from looped.errors import UserError, did_you_mean

VARIANTS: dict[str, dict[str, Any]] = {
    **{context: {"denoise.context": context}
       for context in typing.get_args(DenoiseConfig.model_fields["context"].annotation)},
    **DENOISE_PRESETS,
}
ARMS = (*RULES, *(f"denoise:{variant}" for variant in VARIANTS))
SHARED = ("objective", "seed", "task", "images", "data", "evaluation", "training.budget", "training.budget_unit",
          "training.clock")
"""Settings, or sections of them, in which arms may not differ: the objective is named first, the rest makes them
comparable."""


ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")
"""A name of one's own: it is part of the names of files."""


@dataclass(frozen=True)
class Arm:
    """`text`: the objective with its settings; `name`: what tables call it, that text if it has no name of its own;
    `slug`: the same for a file's name, and no other arm's; `config`: what it stands for; `own`: names of the settings
    that its text spells out."""

    name: str
    slug: str
    config: Config
    text: str
    own: tuple[str, ...] = ()


def parse_arms(config: Config, text: str) -> list[Arm]:
    """The arms of a comma-separated list, as changes to `config`. Raises UserError."""
    return read_arms(config, split_arms(text))


def read_arms(config: Config, texts: typing.Iterable[str]) -> list[Arm]:
    """Arms with names and slugs that differ. Raises UserError."""
    arms: list[Arm] = []
    for text in texts:
        arm = parse_arm(config, text, taken=[arm.slug for arm in arms])
        other = next((other for other in arms if other.name == arm.name), None)
        if other is not None:
            out = "list it once" if other.text == arm.text else "give each of the two a name of its own"
            raise UserError(f"arm '{arm.name}' is listed twice; {out}")
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
    alias, name, settings = _words(text)
    objective, _, variant = name.partition(":")
    flags = {"objective": objective} | (VARIANTS[variant] if variant else {}) | dict(map(_setting, settings))
    plain = " ".join([name, *settings])
    slug = base = alias or re.sub(r"[^A-Za-z0-9.=]+", "-", plain).strip("-")[:60]
    number = 2
    while slug in taken:
        slug, number = f"{base}-v{number}", number + 1
    return Arm(alias or plain, slug, _changed(config, alias or text, flags), plain,
               tuple(_setting(word)[0] for word in settings))


def _words(text: str) -> tuple[str | None, str, list[str]]:
    """(its own name or None, objective with its variant, settings) of an arm. Raises UserError."""
    first, *settings = text.split()
    before, equals, after = first.partition("=")
    alias, name = (before, after) if equals else (None, first)
    if name not in ARMS and "." not in name:  # a dotted path is a rule of one's own
        where = f" in '{first}'" if equals else ""
        raise UserError(f"objective '{name}'{where} is unknown{did_you_mean(name, ARMS)}")
    if alias is not None:
        _check_alias(alias, name)
    return alias, name, settings


def _check_alias(alias: str, name: str) -> None:
    if not ALIAS.fullmatch(alias):
        raise UserError(f"'{alias}' cannot name an arm, as it names files too; take up to 40 letters, digits, - . _ +, "
                        f"a letter or digit first, as in quick={name}")
    if alias in ARMS and alias != name:
        raise UserError(f"'{alias}' cannot name an arm of {name}, being another objective; take another name")


def _setting(word: str) -> tuple[str, Any]:
    name, equals, value = word.removeprefix("--").partition("=")
    if not equals or not value:
        raise UserError(f"'{word}' is not a setting of an arm; write it as denoise.context=concat, without spaces")
    for shared in SHARED:
        if name == shared or name.startswith(f"{shared}."):
            raise UserError(f"an arm cannot set {name}, which all arms share; set it for all of them")
    return name, parse_flag(name, value)


def _changed(config: Config, arm: str, flags: Mapping[str, Any]) -> Config:
    try:
        return config.replace(**flags)
    except UserError as error:
        raise UserError(f"arm '{arm}': {str(error).removeprefix('replace(): ')}") from None
