"""The table of a suite in Markdown: a line an arm, what the paper reports beside it, and what is missing and why."""

import math
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any, Protocol

from looped.compare.budgets import AtEqual, amount
from looped.compare.cells import difference_cell, mean_cell
from looped.compare.curve import UNITS
from looped.compare.summary import Difference, Spread, spread
from looped.data.problems import prepare_task
from looped.evaluation.report import markdown_table
from looped.reproduce.plan import Entry, Order
from looped.reproduce.suite import Column

Rows = Sequence[Mapping[str, Any]]
PAPER = "the paper: "
"""Before the name of a published figure."""


class Known(Protocol):
    """What is known of an entry: its rows, and arm -> why figures are missing."""

    entry: Entry
    rows: Rows
    missing: Mapping[str, str]


class Footnotes:
    """Reasons with their numbers; one that comes again keeps its number."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def mark(self, reason: str) -> str:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"[{self.reasons.index(reason) + 1}]"

    def lines(self) -> list[str]:
        return [f"[{number}] {reason}" for number, reason in enumerate(self.reasons, 1)]


def report(order: Order, results: Sequence[Known]) -> str:
    """Everything: the table, a table of each entry where the suite has details, and what they mean."""
    suite, notes = order.suite, Footnotes()
    main = _table(order, [(result, suite.columns) for result in results], notes)
    details = [f"## {result.entry.name}\n\n{_table(order, [(result, suite.details)], notes, beside=False)}"
               for result in results if suite.details and result.rows]
    arms = "\n".join(_about_arm(order, arm) for arm in order.arms)
    return "\n\n".join([
        f"# {suite.title}", f"Reproduces {suite.reproduces}. Scale {order.scale}, "
        + ("one seed." if order.seeds == 1 else f"mean ± standard deviation over {order.seeds} seeds."),
        main, *(_about_entry(result) for result in results if result.rows), *suite.notes, arms, *details,
        *notes.lines()])


def _table(order: Order, parts: Sequence[tuple[Known, Sequence[Column]]], notes: Footnotes, *,
           beside: bool = True) -> str:
    """Columns of results side by side, and the published ones if they are to stand `beside`."""
    arms = order.suite.arms
    paper = list(dict.fromkeys(name for arm in order.arms for name in arms[arm].published)) if beside else []
    several, by_depth = beside and len(order.suite.entries) > 1, order.suite.by_depth
    columns = [(result, column) for result, some in parts for column in _spread_out(some, result.rows)]
    header = ["arm", *(["depth"] if by_depth else []),
              *(f"{result.entry.name}: {column.label}" if several else column.label for result, column in columns),
              *(f"{PAPER}{name}" for name in paper)]
    lines = [[arm, *([str(depth)] if by_depth else []),
              *(_cell(result, column, {"arm": arm} | ({"depth": depth} if by_depth else {}), notes)
                for result, column in columns), *(str(arms[arm].published.get(name, "-")) for name in paper)]
             for arm in order.arms for depth in (parts[0][0].entry.depths[arm] if by_depth else [None])]
    return markdown_table(header, lines)


def _spread_out(columns: Sequence[Column], rows: Rows) -> list[Column]:
    """Columns with a field in their label, one for each of its values."""
    found = []
    for column in columns:
        names = [name for _, name, _, _ in Formatter().parse(column.label) if name]
        values = sorted({row[names[0]] for row in rows if _fits(row, column.where) and names[0] in row}
                        ) if names else [None]
        found += [column.model_copy(update={"label": column.label.format(**dict.fromkeys(names, value)),
                                            "where": column.where | dict.fromkeys(names, value)})
                  for value in values]
    return found


def _fits(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """A field that a row does not have is null."""
    return all(row.get(name) == value for name, value in where.items())


# ---- cells -----------------------------------------------------------------------------------------------------------


def _cell(result: Known, column: Column, line: Mapping[str, Any], notes: Footnotes) -> str:
    """A figure; the number of the reason where some or all of it is missing."""
    own = [row for row in result.rows if row.get("arm") == line["arm"]]
    found = [row for row in own if _fits(row, line | column.where)]
    reason = result.missing.get(line["arm"])
    shown = SHOWN[column.show](found, column.field, own) if found else "" if reason else "-"
    return " ".join(filter(None, [shown, notes.mark(reason) if reason else ""]))


def spread_of(rows: Rows, field: str, of: Callable[[float], float] = float) -> Spread | None:
    """One figure a seed; or that of a row over all seeds, which leaves out what is not known."""
    if "seed" in rows[0]:
        return spread([of(value) for value in {row["seed"]: row[field] for row in rows}.values()])
    return Spread(rows[0][field], rows[0].get("sd", math.nan), rows[0]["num"]) if rows[0]["num"] else None


def _interval(rows: Rows, field: str, own: Rows) -> str:
    names = ("to", "mean", "ci_low", "ci_high", "sd", "num_seeds")
    return difference_cell(Difference(**{name: rows[0].get(name, math.nan) for name in names}))


def _equal(rows: Rows, field: str, own: Rows) -> str:
    trained = sum(row["kind"] == "cost" for row in own)
    return AtEqual(rows[0]["arm"], rows[0]["budget"], rows[0]["spent"], spread_of(rows, field), trained).cell


SHOWN: dict[str, Callable[[Rows, str, Rows], str]] = {
    "mean": lambda rows, field, own: mean_cell(spread_of(rows, field)),
    "with depth": lambda rows, field, own: f"{mean_cell(spread_of(rows, field))} ({rows[0]['depth']})",
    "whole": lambda rows, field, own: f"{spread_of(rows, field).mean:,.0f}",
    "exp": lambda rows, field, own: mean_cell(spread_of(rows, field, math.exp)),
    "interval": _interval, "equal": _equal}
"""How a column shows the rows it has found; the third are all rows of the arm."""


# ---- sentences -------------------------------------------------------------------------------------------------------


def _about_arm(order: Order, name: str) -> str:
    arm = order.suite.arms[name]
    return f"- {name}: `{arm.text}`" + (f", {arm.budget} times the budget" if arm.budget > 1 else "")


def _about_entry(result: Known) -> str:
    """`s5: all have spent 60 seconds, 5,000 layer forwards; the hardest trained has factors 16.`"""
    spent = {row["budget"]: amount(row["spent"]) for row in result.rows if row["kind"] == "equal"}
    said = f"all have spent {', '.join(f'{spent[unit]} {UNITS[unit]}' for unit in UNITS if unit in spent)}"
    config = result.entry.plan.config
    if config.is_task:
        data = prepare_task(config.task)
        said += f"; the hardest that is trained has {data.task.difficulty} {data.train.high}"
    return f"{result.entry.name}: {said}." if result.entry.name else f"{said.capitalize()}."
