"""The files that a comparison leaves: rows, and a report with pictures, as Markdown and as a page."""

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from looped.compare.budgets import at_equal, equal_note, equal_table
from looped.compare.kinds import Kind
from looped.compare.measure import Measured
from looped.compare.pictures import budget_figures
from looped.compare.plan import Plan
from looped.compare.reach import Reach, sentences
from looped.compare.summary import ArmSummary
from looped.devices import machine
from looped.errors import UserError
from looped.reports.html import page
from looped.reports.markdown import markdown
from looped.reports.sections import Beside, Bullets, Facts, Findings, Folded, Heading, Prose, Section, Verbatim
from looped.storage import write_text
from looped.training.runs import read_stamp

ROWS, TEXT, PAGE = "compare.jsonl", "compare.md", "report.html"
FEW = 4
"""Findings that stand open on the page."""


def write_report(plan: Plan, kind: Kind, measured: Sequence[Measured]) -> str:
    """Write everything into the folder of the plan; the part of the report for a terminal. Raises UserError."""
    arms = kind.summarise(measured)
    found = kind.reaches(arms)
    try:
        write_text(plan.out / ROWS, "".join(json.dumps(_known(row)) + "\n" for row in rows(arms, found)))
        report = sections(plan, kind, arms, found)
        write_text(plan.out / TEXT, markdown(report, plan.out) + "\n")
        write_text(plan.out / PAGE, page(report))
    except OSError as error:
        raise UserError(f"cannot write to {plan.out}: {error.strerror or error}; free space or permissions") from None
    return markdown(report)


def sections(plan: Plan, kind: Kind, arms: Sequence[ArmSummary], found: Sequence[Reach]) -> list[Section]:
    """The report; its pictures are drawn."""
    seeds = "one seed" if plan.num_seeds == 1 else f"{plan.num_seeds} seeds"
    unit, amounts = plan.unit.replace("-", " "), dict.fromkeys(f"{arm.config.training.budget:,}" for arm in plan.arms)
    said = sentences(found)
    return [
        Heading(", ".join(arm.name for arm in arms[:-1]) + (" and " if len(arms) > 1 else "") + arms[-1].name, level=1),
        Prose(f"{' or '.join(amounts)} {unit} of training each, {seeds}, the same held-out {kind.held_out}."),
        Findings(said[:FEW]), Folded(f"{len(said) - FEW} more", [Findings(said[FEW:])]),
        Heading("Quality and cost"), kind.table(arms, plan),
        Heading("At equal budgets"), Prose(equal_note(arms, plan)), equal_table(arms),
        Beside(budget_figures(arms, plan.out)), *kind.depths(arms, plan), *kind.samples(arms),
        Heading("The arms"), Bullets([f"{name}: {text}" for name, text in plan.named.items()]),
        Heading("What the figures mean"), Bullets(kind.notes(arms, plan)),
        Heading("Where it was measured"), Verbatim(shlex.join(["looped", *sys.argv[1:]])), Facts(_facts(plan, arms)),
    ]


def _facts(plan: Plan, arms: Sequence[ArmSummary]) -> dict[str, str]:
    """Where the runs come from, by their stamps; several values where they differ."""
    stamps = [read_stamp(run.place.run) for arm in arms for run in arm.runs]
    commits = [f"{stamp['git_sha'][:12]}{' with changes' if stamp['git_dirty'] else ''}" for stamp in stamps
               if stamp.get("git_sha")]
    versions = [", ".join(f"{name} {version}" for name, version in stamp.get("versions", {}).items() if version)
                for stamp in stamps]
    figures = [row for arm in arms for run in arm.runs for row in run.rows]
    where = machine(plan.config.training.threads or torch.get_num_threads())
    return {"machine": f"{where['processor']}, {where['logical_cpus']} CPUs; {_all(s.get('machine') for s in stamps)}",
            "device": f"{_all(s.get('device') for s in stamps)}, {_all(s.get('threads') for s in stamps)} threads",
            "measured on": _all(f"{row['device']}, {row['dtype']}" for row in figures if "device" in row) or "-",
            "versions": _all(versions), "commit": _all(commits) or "not known",
            "seeds": ", ".join(map(str, range(plan.num_seeds))), "runs": str(plan.out),
            "trained": f"{min(s.get('created', '') for s in stamps)} and after"}


def _all(values: Iterable[Any]) -> str:
    return "; ".join(sorted({str(value) for value in values}))


def rows(arms: Sequence[ArmSummary], found: Sequence[Reach]) -> list[dict[str, Any]]:
    """`kind` figure: a row of an evaluation; cost: what a run took; difference: of an arm to the first; share: of a
    task or of images, a figure of the table; equal: of an arm when so much of a budget had been spent as all runs
    have; reach: when an arm had another's final figure."""
    lines: list[dict[str, Any]] = []
    for arm in arms:
        for run in arm.runs:
            who = {"arm": arm.name, "seed": run.place.seed}
            lines += [{"kind": "figure", **who, **row} for row in run.rows]
            lines.append({"kind": "cost", **who, **run.costs})
        lines += [{"kind": row["kind"], "arm": arm.name} | row for row in arm.rows()]
    lines += [{"kind": "equal", **each.as_dict()} for each in at_equal(arms)]
    return lines + [{"kind": "reach", **each.as_dict()} for each in found]


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """Without what is not known, which JSON has no number for: a spread over one seed."""
    return {name: value for name, value in row.items() if value is not None and value == value}

