"""Benchmark metrics by depth: the benchmark's own figures, with intervals and comparisons paired by question.

A metric is usually a function of a mean over documents: of their scores (accuracy), or of their log-probabilities per
word or byte (perplexity). If the function is one of `READINGS`, the documents' values give the metric an interval and a
paired comparison of its depths. Any other metric is reported without them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from looped.evaluation.depth_verdicts import Measure, Verdict, verdict
from looped.evaluation.intervals import confidence_interval
from looped.evaluation.metric_rows import Row
from looped.inference.sequence_batch import per_token
from looped.tensor_types import Float64

Line = Mapping[str, Any]


@dataclass(frozen=True)
class TaskRow(Row):
    """A metric of a benchmark task at one depth. group: the group the task was requested through. filter: the answer
    filter, if the task has several. num_fewshot: worked examples before each question. limit: only so many first
    documents were used. stderr: the benchmark's own standard error."""

    task: str = ""
    group: str | None = None
    filter: str | None = None
    num_fewshot: int = 0
    limit: int | None = None
    stderr: float | None = None


@dataclass(frozen=True)
class Reading:
    """A metric computed as `shown(mean of values)`. unit: of the values; None if it is the metric's own."""

    values: Callable[[Sequence[Any]], Float64[Tensor, "num"] | None]
    shown: Callable[[float], float]
    unit: str | None = None


def _numbers(scores: Sequence[Any]) -> Float64[Tensor, "num"] | None:
    if not all(isinstance(score, Real) for score in scores):
        return None
    return torch.tensor([float(score) for score in scores], dtype=torch.float64)


def _bits(scores: Sequence[Any]) -> Float64[Tensor, "num"] | None:
    """Bits of each document, from its log-probability."""
    numbers = _numbers(scores)
    return None if numbers is None else -numbers / math.log(2)


def _bits_per_unit(scores: Sequence[Any]) -> Float64[Tensor, "num"] | None:
    """Bits per word or byte, from each document's (log-probability, number of words or bytes)."""
    if not all(isinstance(score, tuple | list) and len(score) == 2 for score in scores):
        return None
    sums, counts = (_numbers(column) for column in zip(*scores, strict=True))
    return None if sums is None or counts is None or counts.sum() <= 0 else per_token(-sums / math.log(2), counts)


READINGS = (Reading(_numbers, lambda mean: mean), Reading(_bits, math.exp2, "bits/answer"),
            Reading(_bits_per_unit, math.exp2, "bits/unit"), Reading(_bits_per_unit, lambda mean: mean, "bits/unit"))
VARIANTS = {"filter": "{}", "num_fewshot": "{}-shot", "limit": "first {}"}
"""Fields that distinguish the curves of one metric of a task, and their text in a label."""
UNITS = {"word_perplexity": "bits/word", "byte_perplexity": "bits/byte", "bits_per_byte": "bits/byte"}
"""Units of the metrics per word or byte."""


def reading_of(figure: float, scores: Sequence[Any]) -> tuple[Reading, Float64[Tensor, "num"]] | None:
    """The first of `READINGS` that reproduces a figure, with the documents' values; None if none does."""
    for reading in READINGS:
        values = reading.values(scores)
        try:
            fits = values is not None and math.isclose(reading.shown(values.mean().item()), figure, rel_tol=1e-9,
                                                       abs_tol=1e-12)
        except OverflowError:
            fits = False
        if fits:
            return reading, values
    return None


@dataclass(frozen=True)
class Figure:
    """A metric of one task at one depth: `figure` as the benchmark reports it, computed from its documents' `scores`.
    chance: the figure of guessing, if known. where: the `TaskRow` fields that identify it."""

    metric: str
    figure: float
    scores: Sequence[Any]
    higher_is_better: bool
    chance: float | None
    where: Line
    stderr: float | None = None

    def lines(self) -> tuple[TaskRow, list[Line]]:
        """The row, and the line of values for paired comparisons, if there are values."""
        found = reading_of(self.figure, self.scores) if self.scores else None
        if found is None:
            return self._row(None, None), []
        reading, values = found
        low, high = map(reading.shown, confidence_interval(values))
        plain = reading.unit is None
        line = {"metric": self.metric, **self.where, "unit": UNITS.get(self.metric, reading.unit) or self.metric,
                "higher_is_better": self.higher_is_better and plain, "chance": self.chance if plain else None,
                "values": values.tolist()}
        return self._row(low, high), [{name: value for name, value in line.items() if value is not None}]

    def _row(self, low: float | None, high: float | None) -> TaskRow:
        return TaskRow(self.metric, self.figure, low, high, len(self.scores), stderr=self.stderr, **self.where)


@dataclass(frozen=True)
class TaskCurve:
    """A metric of a task over depth: its `rows`, and the value of each question by depth. `same`: all metrics with
    these values, this one first."""

    task: str
    metric: str
    rows: Sequence[Line]
    by_depth: Mapping[int, Float64[Tensor, "num"]]
    measure: Measure | None
    same: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.task} ({', '.join(self.same or (self.metric,))})"

    def verdict(self, trained: int | None) -> Verdict | None:
        """The verdict, paired over questions; None if they have no values or only one depth was measured."""
        if self.measure is None or len(self.by_depth) < 2:
            return None
        return verdict(self.by_depth, self.measure, trained=trained)


def curves_of(rows: Sequence[Line], examples: Sequence[Line]) -> list[TaskCurve]:
    """The curves in lines of eval/tasks.jsonl and eval/task_examples.jsonl, in file order."""
    apart: dict[tuple, list[Line]] = {}
    for row in rows:
        apart.setdefault(_key(row), []).append(row)
    values: dict[tuple, dict[int, Line]] = {}
    for line in examples:
        values.setdefault(_key(line), {})[line["depth"]] = line
    several = {row["task"]: _variants(rows, row["task"]) for row in rows}
    return [_curve(sorted(mine, key=lambda row: row["depth"]), values.get(key, {}), several[mine[0]["task"]])
            for key, mine in apart.items()]


def _key(line: Line) -> tuple:
    return tuple(line.get(name) for name in ("task", "metric", "filter", "num_fewshot", "limit"))


def _variants(rows: Sequence[Line], task: str) -> list[str]:
    """The fields in which the rows of one task differ; they distinguish its curves."""
    mine = [row for row in rows if row["task"] == task]
    return [name for name in VARIANTS if len({row.get(name) for row in mine}) > 1]


def _curve(rows: Sequence[Line], lines: Mapping[int, Line], varying: Sequence[str]) -> TaskCurve:
    first = next(iter(lines.values()), None)
    measure = first and Measure(first["unit"], "questions" if first["unit"] == rows[0]["metric"] else "documents",
                                first["higher_is_better"], first.get("chance"))
    said = [VARIANTS[name].format(rows[0].get(name, "all")) for name in varying]
    return TaskCurve(", ".join([rows[0]["task"], *said]), rows[0]["metric"], rows,
                     {depth: torch.tensor(line["values"], dtype=torch.float64)
                      for depth, line in sorted(lines.items())}, measure)


def told_once(curves: Sequence[TaskCurve]) -> list[TaskCurve]:
    """The curves, with metrics of a task that agree in every value merged into one, which names the others."""
    kept: dict[tuple, list[TaskCurve]] = {}
    for curve in curves:
        values = tuple((depth, tuple(each.tolist())) for depth, each in curve.by_depth.items())
        kept.setdefault((curve.task, values or curve.metric), []).append(curve)
    return [TaskCurve(first.task, first.metric, first.rows, first.by_depth, first.measure,
                      (first.metric, *(other.metric for other in others)))
            for first, *others in kept.values()]
