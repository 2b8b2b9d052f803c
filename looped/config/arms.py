"""Arms of a benchmark or comparison: objectives with their own settings, written as text.

    ar, truncated, denoise:concat, denoise:paper, denoise denoise.context=concat model.width=96, wide=ar model.width=96

An arm is an objective, optionally with a variant after a colon, then settings after spaces; a custom name and an equals
sign may precede it. Imports no torch.
"""

import re
import string
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from looped.config import Config, parse_flag
from looped.config.base import Section
from looped.config.denoise import DENOISE_PRESETS, DenoiseConfig
from looped.config.rules import AUTO, RULES
from looped.errors import UserError, did_you_mean

VARIANTS: dict[str, dict[str, Any]] = {
    **{context: {"denoise.context": context}
       for context in typing.get_args(DenoiseConfig.model_fields["context"].annotation)},
    **DENOISE_PRESETS,
}
ARMS = (*RULES, *(f"denoise:{variant}" for variant in VARIANTS))
SHARED = ("objective", "seed", "task", "images", "data", "evaluation", "training.budget", "training.budget_unit",
          "training.clock")
"""Settings or sections that an arm cannot set: its text begins with the objective, and the others must be equal for the
arms to be comparable."""
OWN = ("evaluation.trajectories", "evaluation.choose", "evaluation.state_noise")
"""Settings of a shared section that an arm may set: how it answers, for which each rule has means of its own."""


ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")
"""Pattern of a custom name, which is part of file names."""


@dataclass(frozen=True)
class Arm:
    """One arm. `name`: its label in tables, by default `text`; `slug`: its unique label in file names; `config`: its
    full config; `text`: the objective with its settings; `own`: names of the settings in that text; `variant`: names of
    the settings that its variant changes."""

    name: str
    slug: str
    config: Config
    text: str
    own: tuple[str, ...] = ()
    variant: tuple[str, ...] = ()


def parse_arms(config: Config, text: str) -> list[Arm]:
    """The arms of a comma-separated list, as changes to `config`. Raises UserError."""
    return read_arms(config, split_arms(text))


def read_arms(config: Config, texts: typing.Iterable[str]) -> list[Arm]:
    """Parse arms, each with a unique name and slug. Raises UserError."""
    arms: list[Arm] = []
    for text in texts:
        arm = parse_arm(config, text, taken=[arm.slug for arm in arms])
        other = next((other for other in arms if other.name == arm.name), None)
        if other is not None:
            out = "list it once" if other.text == arm.text else "give the two different names"
            raise UserError(f"arm '{arm.name}' is listed twice; {out}")
        arms.append(arm)
    return arms


def split_arms(text: str) -> list[str]:
    """Split a list into the texts of its arms; a comma inside brackets is part of a value. Raises UserError if one is
    empty."""
    parts = [" ".join(part.split()) for part in split_outside(text, ",")]
    if not all(parts):
        raise UserError(f"--objectives {text!r} has an empty entry; known names: {', '.join(ARMS)}")
    return parts


def split_outside(text: str, separators: str) -> list[str]:
    """Split at the characters of `separators` that are in no brackets: `a=[1, {b: 2}], c` at its last comma alone."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth <= 0 and character in separators:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def words_of(text: str) -> list[str]:
    """The words of an arm: its objective, then its settings, whose values may have spaces in brackets."""
    return [word for word in split_outside(text, string.whitespace) if word]


def parse_arm(config: Config, text: str, *, taken: typing.Collection[str] = ()) -> Arm:
    """Parse one arm, with a slug that is not `taken`. Raises UserError."""
    alias, name, settings = _words(text)
    objective, _, variant = name.partition(":")
    of_variant = VARIANTS[variant] if variant else {}
    given = [_setting(word) for word in settings]
    own = dict(given)
    if len(own) < len(given):
        twice = next(setting for number, (setting, _) in enumerate(given) if setting in dict(given[:number]))
        raise UserError(f"arm '{alias or name}' sets {twice} twice; keep one")
    flags = {"objective": objective} | of_variant | own
    plain = " ".join([name, *settings])
    changed = _changed(config, alias or text, flags)
    slug = base = alias or re.sub(r"[^A-Za-z0-9.=]+", "-", plain).strip("-")[:60]
    number = 2
    while slug in taken:
        slug, number = f"{base}-v{number}", number + 1
    return Arm(alias or plain, slug, changed, plain, tuple(own),
               tuple(_differing(config, changed, of_variant)))


def _differing(config: Config, other: Config, names: typing.Iterable[str]) -> typing.Iterator[str]:
    """The settings of different values, among those of these names or in sections of these names."""
    for name in names:
        value = config.value(name)
        if isinstance(value, Section):
            yield from _differing(config, other, (f"{name}.{inner}" for inner in type(value).model_fields))
        elif value != other.value(name):
            yield name


def _words(text: str) -> tuple[str | None, str, list[str]]:
    """(custom name or None, objective with its variant, settings) of an arm. Raises UserError."""
    first, *settings = words_of(text)
    before, equals, after = first.partition("=")
    alias, name = (before, after) if equals else (None, first)
    if name not in (*ARMS, AUTO) and "." not in name:  # a dotted path is a custom rule; auto is refused with a reason
        where = f" in '{first}'" if equals else ""
        raise UserError(f"objective '{name}'{where} is unknown{did_you_mean(name, ARMS)}")
    if alias is not None:
        _check_alias(alias, name)
    return alias, name, settings


def _check_alias(alias: str, name: str) -> None:
    if not ALIAS.fullmatch(alias):
        raise UserError(f"'{alias}' cannot name an arm, because the name is part of file names; use up to 40 letters, "
                        f"digits, - . _ +, beginning with a letter or digit, as in quick={name}")
    if alias in ARMS and alias != name:
        raise UserError(f"'{alias}' cannot name an arm of {name}, because it is another objective; choose another name")


def _setting(word: str) -> tuple[str, Any]:
    name, equals, value = word.removeprefix("--").partition("=")
    if not equals or not value:
        raise UserError(f"'{word}' is not a setting of an arm; write it as denoise.context=concat, without spaces")
    for shared in SHARED:
        if name not in OWN and (name == shared or name.startswith(f"{shared}.")):
            raise UserError(f"an arm cannot set {name}, which all arms share; set it for all of them")
    return name, parse_flag(name, value)


def _changed(config: Config, arm: str, flags: Mapping[str, Any]) -> Config:
    try:
        return config.replace(**flags)
    except UserError as error:
        raise UserError(f"arm '{arm}': {str(error).removeprefix('replace(): ')}") from None
