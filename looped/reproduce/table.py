"""The table of a suite in Markdown: one line per arm, with the published values and footnotes for missing ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from looped.compare.curve import UNITS
from looped.compare.gains import gain_cell, multiple_cell
from looped.compare.matched_compute import AtEqual, amount
from looped.compare.progress import Reached
from looped.compare.summary import Difference, Spread, spread
from looped.compare.table_cells import difference_cell, mean_cell
from looped.domains import domain_of
from looped.reports.markdown import markdown_table
from looped.reproduce.plan import Order, Result
from looped.reproduce.suite import Column

Rows = Sequence[Mapping[str, Any]]
Notes = dict[str, int]
"""Reason -> the number of its footnote."""
PAPER = "the paper: "
"""Prefix of a published column."""


def report(order: Order, results: Sequence[Result]) -> str:
    """The whole report: the table, a table per entry if the suite has details, and notes."""
    suite, notes = order.suite, Notes()
    seeds = "one seed" if order.seeds == 1 else f"mean ± standard deviation over {order.seeds} seeds"
    paper = list(dict.fromkeys(name for arm in order.arms for name in suite.arms[arm].published))
    main = _table(order, results, suite.columns, notes, paper)
    details = [f"## {result.entry.name}\n\n{_table(order, [result], suite.details, notes)}"
               for result in results if suite.details and result.rows]
    return "\n\n".join([
        f"# {suite.title}", f"Reproduces {suite.reproduces}. Scale {order.asked.scale}, {seeds}.", main,
        *_about_command(order), *(_about_entry(order, result) for result in results if result.rows), *suite.notes,
        "\n".join(_about_arm(order, arm) for arm in order.arms), *details,
        *(f"[{number}] {reason}" for reason, number in notes.items())])


def _table(order: Order, results: Sequence[Result], columns: Sequence[Column], notes: Notes,
           paper: Sequence[str] = ()) -> str:
    """The columns of all results side by side, then the published ones."""
    by_depth, named = order.suite.by_depth, columns is order.suite.columns and len(order.suite.entries) > 1
    placed = [(result, column) for result in results for column in _spread_out(columns, result.rows)]
    header = ["arm", *(["depth"] if by_depth else []),
              *(f"{result.entry.name}: {column.label}" if named else column.label for result, column in placed),
              *(f"{PAPER}{name}" for name in paper)]
    lines = []
    for arm in order.arms:
        depths = sorted({depth for result in results for depth in result.entry.depths[arm]})
        published = [str(order.suite.arms[arm].published.get(name, "-")) for name in paper]
        for line in [{"arm": arm, "depth": depth} for depth in depths] if by_depth else [{"arm": arm}]:
            cells = [_cell(result, column, line, notes) for result, column in placed]
            lines.append([*map(str, line.values()), *cells, *published])
    return markdown_table(header, lines)


def _spread_out(columns: Sequence[Column], rows: Rows) -> list[Column]:
    """The columns; one with a name in its label is expanded to one per value of that key."""
    found = []
    for column in columns:
        name = column.over
        if name is None:
            found.append(column)
            continue
        values = {row[name] for row in rows if _fits(row, column.where) and name in row}
        found += [column.model_copy(update={"label": column.label.format(**{name: value}),
                                            "where": column.where | {name: value}}) for value in sorted(values)]
    return found


def _fits(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """True if the row has all values of `where`; a key missing from the row counts as null."""
    return all(row.get(name) == value for name, value in where.items())


# ---- cells -----------------------------------------------------------------------------------------------------------


def _cell(result: Result, column: Column, line: Mapping[str, Any], notes: Notes) -> str:
    """The value, with a footnote number if some or all runs are missing."""
    own = [row for row in result.rows if row.get("arm") == line["arm"]]
    found = [row | {"mean": row.get(column.field)} for row in own
             if _fits(row, line | column.where) and (column.field in row or "num" in row)]
    shown, reason = SHOWN[column.show](found, own) if found else "", result.missing.get(line["arm"])
    mark = "" if reason is None else f"[{notes.setdefault(reason, len(notes) + 1)}]"
    return f"{shown} {mark}".strip() or "-"


def _spread(rows: Rows, of: Callable[[float], float] = float) -> Spread | None:
    """Spread over rows with one value per seed, or the spread of a row that already averages over seeds; None if it has
    none."""
    if "seed" in rows[0]:
        return spread([of(value) for value in {row["seed"]: row["mean"] for row in rows}.values()])
    return Spread(rows[0]["mean"], rows[0].get("sd", math.nan), rows[0]["num"]) if rows[0]["num"] else None


def _interval(rows: Rows, own: Rows) -> str:
    shown = {name: rows[0].get(name, math.nan) for name in ("to", "mean", "ci_low", "ci_high", "sd", "num_seeds")}
    return difference_cell(Difference(**shown, units=rows[0].get("units", "")))


def _equal(rows: Rows, own: Rows) -> str:
    trained = sum(row["kind"] == "cost" for row in own)
    return AtEqual(rows[0]["arm"], rows[0]["budget"], rows[0]["spent"], _spread(rows), trained).cell


def _reached(rows: Rows, own: Rows) -> str:
    row = rows[0]
    return Reached(row["arm"], row["budget"], row["milestone"], _spread(rows), row["early"], row["num_seeds"]).cell


SHOWN: dict[str, Callable[[Rows, Rows], str]] = {
    "mean": lambda rows, own: mean_cell(_spread(rows)),
    "with depth": lambda rows, own: f"{mean_cell(_spread(rows))} ({rows[0]['depth']})",
    "whole": lambda rows, own: f"{_spread(rows).mean:,.0f}",
    "exp": lambda rows, own: mean_cell(_spread(rows, math.exp)),
    "interval": _interval, "equal": _equal, "reached": _reached,
    "multiple": lambda rows, own: multiple_cell(rows[0]["mean"]),
    "gain": lambda rows, own: gain_cell(rows[0])}
"""Value of `show` -> cell, from the rows that match the column and all rows of the arm."""


# ---- sentences -------------------------------------------------------------------------------------------------------


def _about_arm(order: Order, name: str) -> str:
    arm = order.suite.arms[name]
    return f"- {name}: `{arm.text}`" + (f", {arm.budget:g} times the budget" if arm.budget != 1 else "")


def _about_command(order: Order) -> list[str]:
    """The flags of the command line that changed all arms, as one sentence; empty without any."""
    asked = order.asked
    amount, depths = asked.amount, asked.depths and ",".join(map(str, asked.depths))
    changed = {name: value for name, value in {"amount": amount, "depths": depths}.items() if value is not None}
    flags = [f"--{name} {value}" for name, value in (changed | dict(asked.settings)).items()]
    return [f"On the command line: `{' '.join(flags)}`."] if flags else []


def _about_entry(order: Order, result: Result) -> str:
    """`s5: every run spent at least 60 seconds, 5,000 layer forwards; ...`, with the hardest trained difficulty and
    the settings by which arms differ from their texts here."""
    spent = {row["budget"]: amount(row["spent"]) for row in result.rows if row["kind"] == "equal"}
    said = f"every run spent at least {', '.join(f'{spent[unit]} {UNITS[unit]}' for unit in UNITS if unit in spent)}"
    config = result.entry.plan.config
    said += domain_of(config).hardest(config)
    own = [f"{arm} {name}={value}" for arm in order.arms for name, value in order.own(arm, result.entry.name).items()]
    said += f"; settings of single arms: {', '.join(own)}" if own else ""
    return f"{result.entry.name}: {said}." if result.entry.name else f"{said.capitalize()}."
