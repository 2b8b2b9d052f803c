"""Output files of a comparison: rows (compare.jsonl), and a report with plots as Markdown and as an HTML page."""

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from looped.atomic_files import write_text
from looped.compare.comparison_kinds import Kind
from looped.compare.compute_to_target import Reach, sentences
from looped.compare.gains import Gain, gain_sections, gains
from looped.compare.matched_compute import at_equal, equal_note, equal_table
from looped.compare.measure import Measured
from looped.compare.plan import Plan
from looped.compare.plots import budget_figures
from looped.compare.progress import progress_rows, progress_sections
from looped.compare.summary import ArmSummary
from looped.devices import machine
from looped.errors import UserError
from looped.reports.html import page
from looped.reports.markdown import markdown
from looped.reports.sections import Beside, Bullets, Facts, Findings, Folded, Heading, Prose, Section, Verbatim
from looped.training.runs import read_stamp

ROWS, TEXT, PAGE = "compare.jsonl", "compare.md", "report.html"
FEW = 4
"""Number of findings shown before the fold."""


def write_report(plan: Plan, kind: Kind, measured: Sequence[Measured]) -> str:
    """Write all files into the folder of the plan; returns the report as shown on a terminal. Raises UserError."""
    arms = kind.summarise(measured)
    found = kind.reaches(arms)
    try:
        gained = gains(arms) if len(arms) > 1 else []
        write_text(plan.out / ROWS, "".join(json.dumps(_known(row)) + "\n" for row in rows(plan, arms, found, gained)))
        report = sections(plan, kind, arms, found, gained)
        write_text(plan.out / TEXT, markdown(report, plan.out) + "\n")
        write_text(plan.out / PAGE, page(report))
    except OSError as error:
        raise UserError(f"cannot write to {plan.out}: {error.strerror or error}; check free space and "
                        f"permissions") from None
    return markdown(report)


def sections(plan: Plan, kind: Kind, arms: Sequence[ArmSummary], found: Sequence[Reach],
             gained: Sequence[Gain]) -> list[Section]:
    """The sections of the report; draws its plots."""
    seeds = "one seed" if plan.num_seeds == 1 else f"{plan.num_seeds} seeds"
    unit, amounts = plan.unit.replace("-", " "), dict.fromkeys(f"{arm.config.training.budget:,}" for arm in plan.arms)
    said = sentences(found)
    return [
        Heading(", ".join(arm.name for arm in arms[:-1]) + (" and " if len(arms) > 1 else "") + arms[-1].name, level=1),
        Prose(f"{' or '.join(amounts)} {unit} of training each, {seeds}, the same held-out {kind.held_out}."),
        Findings(said[:FEW]), Folded(f"{len(said) - FEW} more", [Findings(said[FEW:])]),
        Heading("Quality and cost"), kind.table(arms, plan),
        *gain_sections(arms, plan, gained),
        *progress_sections(arms, plan), Heading("At equal budgets"), Prose(equal_note(arms, plan)), equal_table(arms),
        Beside(budget_figures(arms, plan.out)), *kind.depths(arms, plan), *kind.samples(arms),
        Heading("The arms"), Bullets([f"{name}: {text}" for name, text in plan.named.items()]),
        Heading("What the figures mean"), Bullets(kind.notes(arms, plan)),
        Heading("Where it was measured"), Verbatim(shlex.join(["looped", *sys.argv[1:]])), Facts(_facts(plan, arms)),
    ]


def _facts(plan: Plan, arms: Sequence[ArmSummary]) -> dict[str, str]:
    """Machine, versions and commit of the runs, from their stamps; differing values are joined."""
    stamps = [read_stamp(run.place.run) for arm in arms for run in arm.runs]
    commits = [f"{stamp['git_sha'][:12]}{' with uncommitted changes' if stamp['git_dirty'] else ''}" for stamp in stamps
               if stamp.get("git_sha")]
    versions = [", ".join(f"{name} {version}" for name, version in stamp.get("versions", {}).items() if version)
                for stamp in stamps]
    figures = [row for arm in arms for run in arm.runs for row in run.rows]
    where = machine(plan.config.training.threads or torch.get_num_threads())
    return {"machine": f"{where['processor']}, {where['logical_cpus']} CPUs; {_all(s.get('machine') for s in stamps)}",
            "device": f"{_all(s.get('device') for s in stamps)}, {_all(s.get('threads') for s in stamps)} threads",
            "measured on": _all(f"{row['device']}, {row['dtype']}" for row in figures if "device" in row) or "-",
            "versions": _all(versions), "commit": _all(commits) or "unknown",
            "seeds": ", ".join(map(str, range(plan.num_seeds))), "runs": str(plan.out),
            "trained": f"{min(s.get('created', '') for s in stamps)} and later"}


def _all(values: Iterable[Any]) -> str:
    return "; ".join(sorted({str(value) for value in values}))


def rows(plan: Plan, arms: Sequence[ArmSummary], found: Sequence[Reach],
         gained: Sequence[Gain]) -> list[dict[str, Any]]:
    """The rows of compare.jsonl, by `kind`. figure: one row of an evaluation; cost: training cost of a run; difference:
    an arm minus the first arm; share: one cell of the table of a task or of images; equal: an arm at the largest budget
    that all runs reached; progress: at a fraction of it; reached: the budget at which an arm first reaches a milestone;
    reach: compute-to-target between two arms; gain: an arm's gain over the baseline, its weights and its training
    FLOPs."""
    lines: list[dict[str, Any]] = []
    for arm in arms:
        for run in arm.runs:
            who = {"arm": arm.name, "seed": run.place.seed}
            lines += [{"kind": "figure", **who, **row} for row in run.rows]
            lines.append({"kind": "cost", **who, **run.costs})
        lines += [{"kind": row["kind"], "arm": arm.name} | row for row in arm.rows()]
    lines += [{"kind": "equal", **each.as_dict()} for each in at_equal(arms)]
    lines += progress_rows(arms, plan)
    lines += [{"kind": "reach", **each.as_dict()} for each in found]
    return lines + [each.as_dict() for each in gained]


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """The row without None and NaN, such as the spread over one seed, which JSON cannot hold."""
    return {name: value for name, value in row.items() if value is not None and value == value}

