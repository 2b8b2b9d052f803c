"""The report of a run on benchmark tasks by depth, from eval/tasks.jsonl, as an HTML page and as Markdown.

    leave_report(files, config, about, facts)     report.html, report.md, and plots in plots/tasks
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from looped.atomic_files import write_text
from looped.config import Config
from looped.evaluation.benchmarks import TaskCurve, curves_of, told_once
from looped.evaluation.depth_verdicts import HELD, LOST
from looped.evaluation.plots import Curve, plot_depth
from looped.evaluation.result_files import ROWS, TASK_EXAMPLES, TASKS, EvaluationFiles, writing_to
from looped.objectives import trained_depths
from looped.reports.html import page
from looped.reports.markdown import markdown
from looped.reports.runs import depth_table
from looped.reports.sections import Beside, Bullets, Facts, Figure, Findings, Folded, Heading, Prose, Section, Table

RULES = (
    "Values are those of lm-evaluation-harness, intervals are 95 % bootstrap intervals over questions. The verdict is "
    "the first rule that holds. Losses and gains are paired over questions and count if their interval excludes zero. "
    "The best depth for each half of the questions is chosen on the other half.",
    "never: not distinguishable from guessing one of the answers, even at its best depth.",
    f"overthinks: loses more than {LOST} from the best depth to the deepest. drifts: more than {HELD}.",
    f"improves: gains more than {HELD} from the deepest trained depth (or the first measured) to the deepest measured.",
    "settles: none of these.",
    "For a perplexity, the verdict is on its logarithm (bits/word or bits/byte).",
)
PICTURED = ("bits_per_byte", "word_perplexity", "byte_perplexity", "perplexity")
"""Metrics to plot for a task without a fraction of right answers; the first available one is used."""


def leave_report(files: EvaluationFiles, config: Config, about: Any, facts: Mapping[str, str]) -> list[Section]:
    """Write the report of all tasks measured for a checkpoint; returns its sections except folded ones. `about`: as
    `looped.domains.base.About`. Raises UserError."""
    curves = curves_of(files.read(TASKS), files.read(TASK_EXAMPLES))
    with writing_to(files.folder), files.lock():
        (plots := files.folder / "plots" / "tasks").mkdir(parents=True, exist_ok=True)
        found = sections(about, curves, trained_depths(config), plots, facts)
        if text := files.read(ROWS):
            found += [Heading("Held-out text"), *depth_table({about.name: text})]
        write_text(files.folder / "report.html", page(found))
        write_text(files.folder / "report.md", markdown(found, files.folder) + "\n")
    return [section for section in found if not isinstance(section, Folded)]


def sections(about: Any, curves: Sequence[TaskCurve], trained: tuple[int, int], plots: Path,
             facts: Mapping[str, str]) -> list[Section]:
    """The sections of the report; draws its plots into an existing folder. Tasks inside a group are in a
    collapsible section."""
    whole, parts = ([curve for curve in curves if ("group" in curve.rows[0]) is inside] for inside in (False, True))
    span = str(trained[0]) if trained[0] == trained[1] else f"{trained[0]} to {trained[1]}"
    return [
        Heading(f"{about.name}: benchmark tasks over depth", level=1),
        Prose(f"After {about.step} steps; trained at depth {span}."),
        Facts({**facts, "step": str(about.step), "measured on": about.measured_on}),
        Heading("What depth does"), Findings(_verdicts(whole, trained[1])),
        Beside(_pictures(whole, about.name, trained, plots)),
        Heading("Figures"), _table(whole), Prose(_counts(whole)),
        Folded("The tasks inside each group", [_table(parts), Bullets(_verdicts(parts, trained[1]))]),
        Folded("The rules for verdicts", [Bullets(RULES)]),
    ]


def _verdicts(curves: Sequence[TaskCurve], trained: int) -> list[str]:
    """One sentence per curve that can be paired by question."""
    said = ((curve, curve.verdict(trained)) for curve in told_once(curves))
    return [f"{curve.label}: {found.sentence}." for curve, found in said if found is not None]


def _table(curves: Sequence[TaskCurve]) -> Table:
    """One line per metric of a task, one column per depth."""
    depths = sorted({row["depth"] for curve in curves for row in curve.rows})
    lines = []
    for curve in curves:
        at = {row["depth"]: row for row in curve.rows}
        lines.append([curve.task, curve.metric, *(_cell(at.get(depth)) for depth in depths)])
    return Table(["task", "metric", *(f"depth {depth}" for depth in depths)], lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    """`0.412 [0.370, 0.455]`."""
    if row is None:
        return "-"
    mean, *ends = (f"{row[name]:.3f}" if abs(row[name]) < 1000 else f"{row[name]:.3g}"
                   for name in ("mean", "ci_low", "ci_high") if name in row)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def _counts(curves: Iterable[TaskCurve]) -> str:
    """The number of documents of each task, and of few-shot examples before each question."""
    told = dict.fromkeys(f"{curve.task}: {row['n']} documents, {row['num_fewshot']} few-shot examples before each"
                         for curve in curves for row in curve.rows[:1])
    return f"{'; '.join(told)}." if told else ""


def _pictures(curves: Sequence[TaskCurve], name: str, trained: tuple[int, int], plots: Path) -> list[Figure]:
    """One plot per task: its fractions of right answers, or the first of `PICTURED`."""
    found = []
    for task in dict.fromkeys(curve.task for curve in curves):
        drawn = _drawn([curve for curve in curves if curve.task == task])
        if drawn:
            path = plots / f"{re.sub(r'[^A-Za-z0-9._]+', '-', task)}.png"
            plot_depth([Curve(curve.metric, curve.rows, trained, curve.metric, name) for curve in drawn], path)
            metrics = " and ".join(curve.metric for curve in drawn)
            found.append(Figure(path, f"{task}: {metrics} over depth, with 95 % bands; shaded: the trained depths.",
                                f"{task}: {metrics} over depth"))
    return found


def _drawn(curves: Sequence[TaskCurve]) -> list[TaskCurve]:
    """The curves of one task to plot on a shared axis."""
    shares = [curve for curve in curves if curve.measure is not None and curve.measure.unit == curve.metric]
    at = {curve.metric: curve for curve in curves}
    return shares or [at[metric] for metric in PICTURED if metric in at][:1] or list(curves[:1])
