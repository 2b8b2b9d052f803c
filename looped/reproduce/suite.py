"""Schema of a suite: the arms to train for a published table, their evaluation, the published values, and the columns.

    suites/NAME.yaml     one per table; settings: suite < entry < scale < command line
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
"""Dotted name -> value."""
Amount = Annotated[int, Field(ge=1)]


class Layer(Section):
    """Values for all runs, from one level of a suite. `settings`: of all arms; `own`: arm -> its settings; `needs`:
    settings that the user must give -> a noun phrase for each."""

    config: str | None = Field(
        default=None, description="base YAML file of all arms: next to the suite, or in configs/")
    amount: Amount | None = Field(default=None, description="base training budget, in the unit of the suite's budget")
    depths: tuple[Depth, ...] | None = Field(default=None, description="depths to measure; null: evaluation.depths")
    settings: Settings = {}
    own: dict[str, Settings] = {}
    needs: dict[str, str] = {}


class Arm(Section):
    """One line of the table. `published`: column -> value in the paper."""

    text: str = Field(pattern=r"^\S", description="the arm as in `looped compare`, without its name")
    budget: float = Field(default=1, gt=0, description="its budget, as a multiple of `amount`")
    depths: tuple[Depth, ...] | None = None
    published: dict[str, str | float] = {}


class Helper(Section):
    """A model trained before the arms and used to evaluate them."""

    config: str | None = Field(default=None, description="base YAML file; null: only the shared settings")
    shares: tuple[str, ...] = Field(
        default=tuple(Config.model_fields), description="settings or sections that it takes from the arms")
    settings: Settings = {}
    budget: Amount | None = Field(
        default=None, description="its budget, as a multiple of `amount`; null: from its settings")

    @model_validator(mode="after")
    def _check_shares(self):
        for name in self.shares:
            try:
                Config().value(name)
            except AttributeError:
                raise ValueError(f"{name} is neither a setting nor a section of settings; name what it takes from the "
                                 f"arms") from None
        return self


class Evaluation(Section):
    """One `looped eval` for every run; a judge, an encoder or a classifier may be a helper."""

    evaluation: str | None = Field(default=None, description="its name in the rows, for columns to select")
    arms: tuple[str, ...] | None = Field(default=None, description="the arms that it applies to; null: all")
    judge: str | None = None
    mauve: str | None = None
    features: str | None = None
    settings: Settings = {}

    @property
    def flags(self) -> dict[str, str]:
        return self.model_dump(include={"judge", "mauve", "features"}, exclude_none=True)

    @property
    def in_rows(self) -> dict[str, str]:
        """The fields that tell its rows from those of other evaluations."""
        return self.flags | self.model_dump(include={"evaluation"}, exclude_none=True)

    def applies_to(self, arm: str) -> bool:
        return self.arms is None or arm in self.arms


class Scale(Layer):
    """One size of the reproduction."""

    time: str = Field(description="how long it takes, and on which machine")
    arms: tuple[str, ...] | None = Field(default=None, description="null: all")
    entries: tuple[str, ...] | None = Field(default=None, description="null: all")
    beforehand: dict[str, Helper] = {}
    evaluate: tuple[Evaluation, ...] = ()


class Column(Section):
    """One column of the table; a label with `{name}` makes one column per value of that key in the rows. `where`: key
    -> value that its rows must have; `field`: the key that it shows."""

    label: str
    where: dict[str, Any]
    field: str = "mean"
    show: Literal["mean", "with depth", "whole", "exp", "interval", "equal", "multiple", "gain", "reached"] = "mean"

    @model_validator(mode="after")
    def _check_label(self):
        self.label.format(**({} if self.over is None else {self.over: 0}))
        return self

    @property
    def over(self) -> str | None:
        """The name in the braces of the label, if any. Raises ValueError for an invalid label."""
        names = [name for _, name, _, _ in Formatter().parse(self.label) if name is not None]
        if len(names) > 1 or not all(map(str.isidentifier, names)):
            raise ValueError(f"label {self.label} needs exactly one name in braces, or no braces; write for instance "
                             f"'{{depth}} steps'")
        return names[0] if names else None


class Suite(Layer):
    """A published table. `entries`: data sets or tasks, each with its own comparison."""

    title: str
    reproduces: str = Field(description="paper, arXiv number and table")
    budget: Literal["tokens", "layer-forwards", "seconds"]
    seeds: Amount = 3
    arms: dict[str, Arm] = Field(min_length=1)
    entries: dict[str, Layer] = Field(default={"": Layer()}, min_length=1)
    scales: dict[str, Scale] = Field(min_length=1)
    by_depth: bool = Field(default=False, description="one line per arm and depth instead of one per arm")
    columns: tuple[Column, ...] = Field(description="columns of the main table, repeated side by side for each entry")
    details: tuple[Column, ...] = Field(default=(), description="columns of a further table for each entry")
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_names(self):
        for where, layer in [("suite", self), *self.entries.items(), *self.scales.items()]:
            self._check_known(where, layer.own, self.arms)
        for name, scale in self.scales.items():
            self._check_known(name, scale.arms or (), self.arms)
            self._check_known(name, scale.entries or (), self.entries)
            for step in scale.evaluate:
                self._check_known(name, step.arms or (), self.arms)
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
    """The value of a field in the last layer that sets it; None if none does."""
    return next((value for layer in reversed(layers) if (value := getattr(layer, field)) is not None), None)


def merged(layers: Sequence[Layer], field: str) -> dict[str, Any]:
    """The union of a field over the layers; later layers override earlier ones."""
    return {name: value for layer in layers for name, value in getattr(layer, field).items()}


def load_suite(path: Path) -> Suite:
    """Load a suite from a file. Raises UserError."""
    return validated(Suite, read_yaml(path, "suite", "suites"), str(path))


def find_suite(name: str) -> Path:
    """The file of a suite: a path, or the name of a shipped suite, with dashes or underscores. Raises UserError."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = known_suites()
    if (stem := name.replace("-", "_")) not in known:
        raise UserError(f"there is no suite '{name}'{did_you_mean(stem, known)}; for a custom suite, give the path of "
                        f"its YAML file")
    return known[stem]


def known_suites() -> Mapping[str, Path]:
    """Name -> file, for the suites shipped with the package."""
    return shipped("suites")


def find_config(name: str, suite: Path) -> Path:
    """The config named by a suite: a file next to the suite, or a shipped config. Raises UserError."""
    path = suite.parent / name
    return path if path.exists() else config_path(Path(name).stem)
