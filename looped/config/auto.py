"""`objective: auto`: the rule, and the settings that belong to it, which were measured best for a kind of data.

The choices are those of `Kind.auto`; docs/when-depth-pays.md and docs/depth.md have the figures behind them. A config
holds what was chosen, never the word: with `--objective auto` the choice replaces settings of the file and gives way to
other flags; in a file it gives way to the file's own settings. Imports no torch.
"""

import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from looped.config.data import DomainConfig, TaskConfig
from looped.config.data_kinds import KINDS, kind_of
from looped.config.images import ImageConfig
from looped.errors import UserError

AUTO = "auto"
SECTIONS: dict[str, Any] = {"domain": DomainConfig, "images": ImageConfig, "task": TaskConfig}
"""The sections that decide the kind of data."""


def choice(values: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen settings, dotted name -> value, for the data of nested `values`, with a notice that names them. Raises
    UserError for a kind of data without a measured choice."""
    sections = {name: section.model_validate(values.get(name) or {}) for name, section in SECTIONS.items()}
    kind = kind_of(SimpleNamespace(**sections))
    if not kind.auto:
        known = " and ".join(each.noun for each in KINDS.values() if each.auto)
        raise UserError(f"objective auto has no measured choice for {kind.noun}, only for {known}; name a rule, as "
                        f"--objective ar")
    settings = ", ".join(f"{name} {value}" for name, value in kind.auto.items())
    warnings.warn(f"objective auto for {kind.noun}: {settings}", stacklevel=2)
    return dict(kind.auto)
