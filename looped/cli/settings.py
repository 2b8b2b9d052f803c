"""`looped settings`: list all settings, section by section."""

import textwrap
from dataclasses import dataclass

from tyro.conf import Positional

from looped.cli.verb import Settings as Flags
from looped.cli.verb import Verb, no_settings
from looped.config import describe_settings
from looped.errors import UserError, did_you_mean

WIDTH = 100


@dataclass
class Settings(Verb):
    """List the settings of a section with their defaults and descriptions; without a section, list the sections."""

    section: Positional[str | None] = None
    """a section, e.g. denoise or denoise.noise, or a setting, e.g. model.width; if not given, all sections"""
    search: str | None = None
    """only settings whose name or description contains this text; in all sections if none is named"""

    def __call__(self, settings: Flags) -> None:
        no_settings(settings, "settings")
        known = describe_settings()
        if self.section is None and self.search is None:
            print(sections())
            return
        found = [each for each in known if self._is_of(each[0]) and self._matches(" ".join(each))]
        if not found and self.search is None:
            names = {part for name, *_ in known for part in (name, name.rpartition(".")[0]) if part}
            raise UserError(f"there is no section or setting '{self.section}'"
                            f"{did_you_mean(str(self.section), names)}")
        if not found:
            raise UserError(f"no setting has '{self.search}' in its name or description; see looped settings")
        for name, default, description in found:
            print(f"--{name} [{default}]")
            print(textwrap.fill(description, WIDTH, initial_indent="    ", subsequent_indent="    "))

    def _is_of(self, name: str) -> bool:
        return self.section is None or f"{name}.".startswith(f"{self.section}.")

    def _matches(self, text: str) -> bool:
        return self.search is None or self.search.lower() in text.lower()


def sections() -> str:
    """One line per section: its name and the names of its settings."""
    found: dict[str, list[str]] = {}
    for name, *_ in describe_settings():
        section, _, setting = name.rpartition(".")
        found.setdefault(section, []).append(setting)
    lines = []
    for section, names in found.items():
        title = f"  {section or '(top level)'}"
        lines.append(textwrap.fill(f"{title:<22}{', '.join(names)}", WIDTH, subsequent_indent=" " * 22))
    return "\n".join(lines)
