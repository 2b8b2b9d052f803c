"""What a comparison leaves in its folder: rows, a table, pictures and a page that holds all of it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from looped.compare.measure import Measured
from looped.compare.pictures import draw
from looped.compare.plan import Plan
from looped.compare.summary import ArmSummary, Reach, reaches, summarise_arms
from looped.compare.table import notes, sentence, table
from looped.errors import UserError
from looped.evaluation.report import markdown_table
from looped.training.checkpoint import write_text

ROWS, TABLE, PAGE = "compare.jsonl", "compare.md", "report.html"


def write_report(plan: Plan, measured: Sequence[Measured]) -> str:
    """Write everything into the folder of the plan; the table with its sentences. Raises UserError."""
    arms = summarise_arms(measured)
    found = reaches(arms)
    header, lines = table(arms, plan)
    text = "\n\n".join([markdown_table(header, lines), *map(sentence, found), *notes(arms, plan)])
    try:
        write_text(plan.out / ROWS, "".join(json.dumps(_known(row)) + "\n" for row in rows(arms, found)))
        write_text(plan.out / TABLE, text + "\n")
        draw(arms, plan.out)
    except OSError as error:
        raise UserError(f"cannot write to {plan.out}: {error.strerror or error}; free space or permissions") from None
    return text


def rows(arms: Sequence[ArmSummary], found: Sequence[Reach]) -> list[dict[str, Any]]:
    """`kind` figure: a row of an evaluation; cost: what a run took; difference: of an arm to the first; reach: when an
    arm had another's final loss."""
    lines: list[dict[str, Any]] = []
    for arm in arms:
        for run in arm.runs:
            who = {"arm": arm.name, "seed": run.place.seed}
            lines += [{"kind": "figure", **who, **row} for row in run.rows]
            lines.append({"kind": "cost", **who, **run.costs})
        if arm.difference is not None:
            lines.append({"kind": "difference", "arm": arm.name, **asdict(arm.difference)})
    return lines + [{"kind": "reach", **asdict(each)} for each in found]


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """Without what is not known, which JSON has no number for: a spread over one seed."""
    return {name: value for name, value in row.items() if value is not None and value == value}

