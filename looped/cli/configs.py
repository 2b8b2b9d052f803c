"""`looped configs`: list, print or copy the configs shipped with the package."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from looped.cli.verb import Settings, Verb, no_settings
from looped.config.shipped import config_path, shipped, summary
from looped.errors import UserError


@dataclass
class Configs(Verb):
    """List the configs shipped with looped, print one, or copy one to a file as a starting point.

    A shipped config can be named wherever a config is expected: `looped train smoke`.
    """

    name: Positional[str | None] = None
    """the config to print; if not given, all are listed"""
    out: Path | None = None
    """copy it to this file, which must not exist"""

    def __call__(self, settings: Settings) -> None:
        no_settings(settings, "configs")
        if self.name is None:
            if self.out is not None:
                raise UserError("--out copies one config; name it, as in looped configs smoke --out mine.yaml")
            known = shipped("configs")
            width = max(map(len, known))
            for name, path in known.items():
                print(f"  {name:<{width}}  {summary(path)}")
            return
        text = config_path(self.name).read_text(encoding="utf-8")
        if self.out is None:
            print(text, end="")
            return
        try:
            with open(self.out, "x", encoding="utf-8", newline="") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"cannot write {self.out}: {error.strerror or error}; choose another --out") from None
        print(f"{self.out}: train it with looped train {self.out}")
