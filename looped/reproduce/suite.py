"""Suites: what is trained for a published table and how it is measured, what the paper reports, and the table.

    suites/NAME.yaml     one a table; settings of the suite < of an entry < of the scale < of the command
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from looped.config import Config
from looped.config.base import Depth, Section
from looped.config.files import read_yaml, validated
from looped.config.shipped import config_path, shipped
from looped.errors import UserError, did_you_mean

Settings = dict[str, Any]
"""Dotted names to values."""
Amount = Annotated[int, Field(ge=1)]


class Layer(Section):
    """Part of what all runs are given. `own`: settings of single arms. `needs`: settings that only the user can give,
    and what they are, as a noun."""

    config: str | None = Field(None, description="the YAML file that all arms start from: beside the suite, or one of "
                                                 "configs/")
    amount: Amount | None = Field(None, description="how much of the budget every run gets")
    depths: tuple[Depth, ...] | None = Field(None, description="that are measured; null: evaluation.depths")
    settings: Settings = {}
    own: dict[str, Settings] = {}
    needs: dict[str, str] = {}


class Arm(Section):
    """One line of the table. `published`: column -> what the paper reports of it."""

    text: str = Field(pattern=r"^\S", description="as `looped compare` reads it, without its name")
    budget: Amount = Field(1, description="amounts of the budget that it gets")
    depths: tuple[Depth, ...] | None = None
    published: dict[str, str | float] = {}


class Helper(Section):
    """A run that is trained before the arms, for their evaluation."""

    config: str | None = Field(None, description="what it starts from; null: nothing but what it shares")
    shares: tuple[str, ...] = Field(tuple(Config.model_fields), description="settings, or sections, that it has from "
                                                                            "the arms")
    settings: Settings = {}
    budget: Amount | None = Field(None, description="amounts of the budget; null: as its settings say")

    @model_validator(mode="after")
    def _check_shares(self):
        for name in self.shares:
            try:
                Config().value(name)
            except AttributeError:
                raise ValueError(f"{name} is neither a setting nor a section of them; name what it shares with the "
                                 f"arms") from None
        return self


class Evaluation(Section):
    """One `looped eval` of every run; a judge, an encoder or a classifier may be a helper."""

    judge: str | None = None
    mauve: str | None = None
    features: str | None = None
    settings: Settings = {}

    @property
    def flags(self) -> dict[str, str]:
        return self.model_dump(include={"judge", "mauve", "features"}, exclude_none=True)


class Scale(Layer):
    """One size of the reproduction."""

    time: str = Field(description="how long it takes, on what")
    arms: tuple[str, ...] | None = Field(None, description="null: all")
    entries: tuple[str, ...] | None = Field(None, description="null: all")
    beforehand: dict[str, Helper] = {}
    evaluate: tuple[Evaluation, ...] = ()


class Column(Section):
    """One column, or with `{name}` in its label one for each value that the rows have under that name. `where`: fields
    of the rows that it shows, `field`: the figure in them."""

    label: str
    where: dict[str, Any]
    field: str = "mean"
    show: Literal["mean", "with depth", "whole", "exp", "interval", "equal"] = "mean"

    @model_validator(mode="after")
    def _check_label(self):
        self.label.format(**({} if self.over is None else {self.over: 0}))
        return self

    @property
    def over(self) -> str | None:
        """The name in its label. Raises ValueError for a label that is none."""
        names = [name for _, name, _, _ in Formatter().parse(self.label) if name is not None]
        if len(names) > 1 or not all(map(str.isidentifier, names)):
            raise ValueError(f"label {self.label} has more than one name in braces, or no name in them; a column is "
                             f"spread out over one, as in '{{depth}} steps'")
        return names[0] if names else None


class Suite(Layer):
    """A published table. `entries`: sets of images or tasks, of which each has a comparison of its own."""

    title: str
    reproduces: str = Field(description="paper, arXiv number, table")
    budget: Literal["tokens", "layer-forwards", "seconds"]
    seeds: Amount = 3
    arms: dict[str, Arm] = Field(min_length=1)
    entries: dict[str, Layer] = Field({"": Layer()}, min_length=1)
    scales: dict[str, Scale] = Field(min_length=1)
    by_depth: bool = Field(False, description="a line for each depth of an arm")
    columns: tuple[Column, ...] = Field(description="of the table; those of all entries stand side by side")
    details: tuple[Column, ...] = Field((), description="of a table of each entry")
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_names(self):
        for where, layer in [("suite", self), *self.entries.items(), *self.scales.items()]:
            self._check_known(where, layer.own, self.arms)
        for name, scale in self.scales.items():
            self._check_known(name, scale.arms or (), self.arms)
            self._check_known(name, scale.entries or (), self.entries)
            for entry in scale.entries or self.entries:
                layers = (self, self.entries[entry], scale)
                for field in ("config", "amount"):
                    if last(layers, field) is None:
                        raise ValueError(f"scale {name} has no {field}{f' for {entry}' if entry else ''}; set it there")
        return self

    def _check_known(self, where: str, names: Iterable[str], known: Iterable[str]) -> None:
        for name in names:
            if name not in known:
                raise ValueError(f"{where} names '{name}', which is unknown{did_you_mean(name, known)}")


def last(layers: Sequence[Layer], field: str) -> Any:
    """The value of the last layer that has one."""
    return next((value for layer in reversed(layers) if (value := getattr(layer, field)) is not None), None)


def merged(layers: Sequence[Layer], field: str) -> dict[str, Any]:
    """All that the layers say, later ones above earlier ones."""
    return {name: value for layer in layers for name, value in getattr(layer, field).items()}


def load_suite(path: Path) -> Suite:
    """The suite of a file. Raises UserError."""
    return validated(Suite, read_yaml(path, "suite", "suites"), str(path))


def find_suite(name: str) -> Path:
    """The file of a suite that comes with the package, with dashes or underscores, or a path. Raises UserError."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = known_suites()
    if (stem := name.replace("-", "_")) not in known:
        raise UserError(f"there is no suite '{name}'{did_you_mean(stem, known)}; a suite of your own is the path of a "
                        f"YAML file")
    return known[stem]


def known_suites() -> Mapping[str, Path]:
    """Name -> file, of the suites that come with the package."""
    return shipped("suites")


def find_config(name: str, suite: Path) -> Path:
    """A config that a suite names: a file beside it, or one that comes with the package. Raises UserError."""
    beside = suite.parent / name
    return beside if beside.exists() else config_path(Path(name).stem)
