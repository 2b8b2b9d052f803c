"""The depth report of a run on a task, as an HTML page and as Markdown.

    write_depth_report(run, DepthReport(...))     run/report.html, run/report.md, and their plots in run/plots

`DepthReport` holds the measurements; this module derives verdicts, fits, tables and plots from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from looped.atomic_files import write_text
from looped.evaluation.depth_verdicts import CYCLING, HELD, LOST, SOLVED, Verdict, verdict
from looped.evaluation.metric_rows import Row
from looped.evaluation.plots_tasks import Trained, plot_levels, plot_map, plot_problem, plot_rest
from looped.evaluation.saturation import fit_saturation
from looped.evaluation.solving import Example
from looped.evaluation.stability import Stability
from looped.reports.html import page
from looped.reports.markdown import markdown
from looped.reports.sections import Beside, Bullets, Facts, Figure, Findings, Folded, Heading, Prose, Section, Table
from looped.tensor_types import Bool

RULES = (
    "The verdict is the first of these rules that holds. Losses and gains are paired over problems and count if their "
    "95 % bootstrap interval excludes zero. The best depth for each half of the problems is chosen on the other half, "
    "so that choosing the best of noisy values does not look like a loss after it. The best depth of a line and what "
    "is solved there are of all problems.",
    "never: not distinguishable from chance, even at its best depth.",
    f"cycles: for more than {100 * CYCLING:.0f} % of the problems, two or more answers alternate periodically.",
    f"overthinks: loses more than {LOST} from the best depth to the deepest. drifts: more than {HELD}.",
    f"improves: gains more than {HELD} from the deepest trained depth to the deepest measured.",
    "settles: none of these.",
)
FIT = ("quality(t) = q_inf + z exp(-rate t) by least squares over the measured depths t; the gain is measured from "
       "the first of them.")
REST = ("Medians over problems. Contraction: the size of a change divided by that of the previous one; below 1, the "
        "changes shrink.")


@dataclass(frozen=True)
class DepthReport:
    """The contents of the report. Results are in the form of `looped.evaluation.solving`: `rows` with metrics `solved`
    and `cells` at every difficulty and depth, `per_example[difficulty][depth]`, and `exits` from `exit_rows`.

    name: name of the run. facts: description and training cost of the run; must include `task`, `rule` and `step`.
    difficulty: noun for the quantity that the difficulty counts. stability: at most one per difficulty; its answers by
    step also decide whether the verdict is `cycles`.
    """

    name: str
    facts: Mapping[str, str]
    difficulty: str
    trained: Trained
    rows: Sequence[Row]
    per_example: Mapping[int, Mapping[int, Bool[Tensor, "num"]]]
    stability: Sequence[Stability] = ()
    exits: Sequence[Row] = ()
    example: Example | None = None

    @cached_property
    def shares(self) -> dict[int, dict[int, float]]:
        """Difficulty -> depth -> share solved (fraction of problems)."""
        return {level: {depth: right.double().mean().item() for depth, right in sorted(by_depth.items())}
                for level, by_depth in sorted(self.per_example.items())}

    @cached_property
    def verdicts(self) -> dict[int, Verdict]:
        """Difficulty -> verdict on its depth curve."""
        answers = {solve.difficulty: solve.answers for solve in self.stability}
        return {level: verdict(self.per_example[level], SOLVED, trained=self.trained.depths[1],
                               answers=answers.get(level)) for level in self.shares}

    def is_trained(self, level: int) -> bool:
        return self.trained.difficulties[0] <= level <= self.trained.difficulties[1]


def write_depth_report(folder: Path, report: DepthReport) -> None:
    """Write the report into a folder. Raises OSError."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    found = sections(report, folder / "plots")
    write_text(folder / "report.html", page(found))
    write_text(folder / "report.md", markdown(found, folder) + "\n")


def sections(report: DepthReport, plots: Path) -> list[Section]:
    """The sections of the report; draws its plots into an existing folder."""
    facts, levels = report.facts, list(report.shares)
    return [
        Heading(f"{report.name}: {facts['task']} over depth and difficulty", level=1),
        Prose(f"{facts['rule']} after {facts['step']} steps; trained at {report.difficulty} "
              f"{_span(report.trained.difficulties)} and depth {_span(report.trained.depths)}, evaluated "
              f"at {report.difficulty} {_span((levels[0], levels[-1]))}."),
        Facts(facts),
        Heading("What depth does"),
        Findings([f"{_level(report, level)} {found.sentence}." for level, found in report.verdicts.items()]),
        Beside(_pictures(report, plots)),
        Heading("Share of problems solved"), _by_depth(report, "solved"),
        Folded("Fraction of predicted cells equal to the reference", [_by_depth(report, "cells")]),
        Heading("Verdicts"), _compared(report), Folded("The rules for verdicts", [Bullets(RULES)]),
        Heading("Saturation"), _saturation(report), Prose(FIT),
        Heading("Convergence and path independence"), *_stability(report, plots),
        Heading("Early exit"), _exits(report),
        Heading("An example problem"), *_example(report, plots),
    ]


# ---- text ------------------------------------------------------------------------------------------------------------


def _span(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _level(report: DepthReport, level: int) -> str:
    return f"{report.difficulty} {level}{' (trained)' if report.is_trained(level) else ''}:"


def _share(row: Row | None) -> str:
    return "-" if row is None else row.shown(ends=".2f")


# ---- tables ----------------------------------------------------------------------------------------------------------

def _by_depth(report: DepthReport, metric: str) -> Table:
    """One line per difficulty, one column per depth; the last line is the cost per problem."""
    at = {(row.difficulty, row.depth): row for row in report.rows if row.metric == metric}
    depths = sorted({depth for _, depth in at})
    lines = [[str(level), *(_share(at.get((level, depth))) for depth in depths)] for level in report.shares]
    cost = {row.depth: row.layer_forwards for row in at.values() if row.layer_forwards is not None}
    if cost:
        lines.append(["layer forwards", *(f"{cost[depth]:,.0f}" if depth in cost else "-" for depth in depths)])
    return Table([report.difficulty, *(f"depth {depth}" for depth in depths)], lines)


def _compared(report: DepthReport) -> Table:
    header = [report.difficulty, "trained", "verdict", "best depth", "solved there", "deepest", "solved there",
              "from the best", "from the trained depth"]
    return Table(header, [
        [str(level), "yes" if report.is_trained(level) else "no", found.name, str(found.best),
         f"{report.shares[level][found.best]:.3f}", str(found.deepest), f"{report.shares[level][found.deepest]:.3f}",
         *(f"{change.mean:+.3f} [{change.low:+.2f}, {change.high:+.2f}]"
           for change in (found.from_best, found.from_trained))] for level, found in report.verdicts.items()])


def _saturation(report: DepthReport) -> Table:
    lines = []
    for level, means in report.shares.items():
        fit, said = fit_saturation(means, per_example=report.per_example[level])
        lines.append([str(level), *(["-"] * 4 if fit is None else [
            f"{fit.q_inf:.3f}", f"{fit.rate:.3g}", f"{fit.depth_95:.1f}", f"{fit.residual:.3f}"]), said])
    return Table([report.difficulty, "q_inf", "rate", "95 % of the gain by depth", "residual",
                  "the curve, or why there is no fit"], lines)


def _exits(report: DepthReport) -> Table:
    """One line per difficulty and exit."""
    at = {(row.difficulty, row.by, row.metric): row for row in report.exits}
    most = {(row.difficulty, row.depth): row.evaluations for row in report.rows if row.evaluations is not None}
    lines = []
    for (level, by, metric), used in at.items():
        if metric != "steps_used":
            continue
        left, lost = (at[level, by, name] for name in ("solved_with_exit", "lost_by_exit"))
        kind, _, threshold = (by or "").partition("=")
        ran = f"{used.mean:.1f} of {most.get((level, used.depth), used.depth):.0f}"
        cost = "-" if used.layer_forwards is None else f"{used.layer_forwards:,.1f}"
        lines.append([str(level), kind, threshold or "-", ran, cost, _share(left),
                      f"{left.mean + lost.mean:.3f}", lost.shown("+.3f", "+.2f")])
    header = [report.difficulty, "exit", "threshold", "mean evaluations", "layer forwards", "solved",
              "solved by all steps", "lost, paired"]
    return Table(header, lines)


# ---- pictures --------------------------------------------------------------------------------------------------------


def _pictures(report: DepthReport, plots: Path) -> list[Figure]:
    plot_map(report.shares, report.trained, plots / "map.png", difficulty=report.difficulty)
    plot_levels([row for row in report.rows if row.metric == "solved"], report.trained, plots / "levels.png",
                difficulty=report.difficulty)
    return [Figure(plots / "map.png", "Share of problems solved by depth and difficulty; framed: the trained range.",
                   _spoken(report)),
            Figure(plots / "levels.png", "The same as curves with 95 % bands; shaded: the trained depths.",
                   f"Curves of the share solved over depth, one for each {report.difficulty}")]


def _spoken(report: DepthReport) -> str:
    """Text alternative of the map: share solved of each difficulty at the first and last depth."""
    ends = (f"{level}: {shares[min(shares)]:.2f} at depth {min(shares)}, {shares[max(shares)]:.2f} at {max(shares)}"
            for level, shares in report.shares.items())
    return f"Map of the share solved. {report.difficulty} " + "; ".join(ends)


def _stability(report: DepthReport, plots: Path) -> list[Section]:
    """Convergence of the solves, and the effect of another initial state; empty if not measured."""
    if not report.stability:
        return []
    header = [report.difficulty, "steps", "last change", "contraction, second half", "same answer from another start",
              "cosine", "relative distance"]
    said = [f"{_level(report, solve.difficulty)} {solve.sentence}." for solve in report.stability]
    return [Table(header, [_rest(solve) for solve in report.stability]), Prose(REST),
            Beside([*_rest_figure(report, plots), Bullets(said)])]


def _rest_figure(report: DepthReport, plots: Path) -> list[Section]:
    """Plot of the change from step to step; empty if there is only one step."""
    if not any(solve.by_step("latent_change") for solve in report.stability):
        return []
    plot_rest(report.stability, plots / "rest.png", difficulty=report.difficulty)
    latent = report.stability[0].latent
    return [Figure(plots / "rest.png", f"Change of the {latent} at each step, as a fraction of its norm: "
                                       f"medians over problems, with 95 % bands.",
                   f"Change of the {latent} by step")]


def _rest(solve: Stability) -> list[str]:
    changes, rate = solve.by_step("latent_change"), solve.late_contraction
    same, cosine, distance = map(solve.figure, ("same_answer", "latent_cosine", "latent_distance"))
    return [str(solve.difficulty), str(solve.depth), f"{changes[max(changes)].mean:.2g}" if changes else "-",
            "-" if rate is None else f"{rate:.3f}", _share(same), "-" if cosine is None else f"{cosine.mean:.3f}",
            "-" if distance is None else f"{distance.mean:.2g}"]


def _example(report: DepthReport, plots: Path) -> list[Section]:
    """A problem and the answer of the run; empty without one."""
    shown = report.example
    if shown is None:
        return []
    plot_problem(shown.task, shown.problem, shown.answer, plots / "problem.png")
    right = "right" if shown.task.solved_by(shown.problem, shown.answer) else "wrong"
    return [Figure(
        plots / "problem.png", f"A held-out problem, {report.difficulty} {shown.difficulty}, and the answer after "
        f"{shown.depth} steps, which is {right}: predicted cells are blue, wrong cells are framed in red.",
        f"A problem, {report.difficulty} {shown.difficulty}, and a {right} answer")]
