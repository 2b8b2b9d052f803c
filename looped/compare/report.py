"""What a comparison leaves in its folder: rows, a table, pictures and a page that holds all of it."""

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from looped.compare.html import Figure, Page, render
from looped.compare.measure import Measured
from looped.compare.pictures import DEPTH, budget_picture, draw
from looped.compare.plan import Plan
from looped.compare.summary import BUDGETS, ArmSummary, Reach, reaches, summarise_arms
from looped.compare.table import UNITS, notes, samples_table, sentence, table
from looped.errors import UserError
from looped.evaluation.cost import machine
from looped.evaluation.report import markdown_table
from looped.training.checkpoint import write_text
from looped.training.runs import read_stamp

ROWS, TABLE, PAGE = "compare.jsonl", "compare.md", "report.html"
NUM_SAMPLES = 3
"""Texts of an arm on the page."""


def write_report(plan: Plan, measured: Sequence[Measured]) -> str:
    """Write everything into the folder of the plan; the table with its sentences. Raises UserError."""
    arms = summarise_arms(measured)
    found = reaches(arms)
    header, lines = table(arms, plan)
    judged = samples_table(arms)
    tables = [markdown_table(header, lines), *([markdown_table(*judged)] if judged else [])]
    text = "\n\n".join([*tables, *map(sentence, found), *notes(arms, plan)])
    try:
        write_text(plan.out / ROWS, "".join(json.dumps(_known(row)) + "\n" for row in rows(arms, found)))
        write_text(plan.out / TABLE, text + "\n")
        draw(arms, plan.out)
        write_text(plan.out / PAGE, render(page(plan, arms, found)))
    except OSError as error:
        raise UserError(f"cannot write to {plan.out}: {error.strerror or error}; free space or permissions") from None
    return text


def page(plan: Plan, arms: Sequence[ArmSummary], found: Sequence[Reach]) -> Page:
    """What the page holds; the pictures are drawn."""
    seeds = "one seed" if plan.num_seeds == 1 else f"{plan.num_seeds} seeds"
    unit = plan.unit.replace("-", " ")
    band = "" if plan.num_seeds == 1 else " Lines are means over seeds, bands go from the lowest seed to the highest."
    return Page(
        title=", ".join(arm.name for arm in arms[:-1]) + (" and " if len(arms) > 1 else "") + arms[-1].name,
        subtitle=f"{plan.amount:,} {unit} of training each, {seeds}, the same held-out text.",
        command=shlex.join(["looped", *sys.argv[1:]]), findings=[sentence(each) for each in found],
        table=table(arms, plan), judged=samples_table(arms), notes=notes(arms, plan), samples=_samples(arms),
        facts=_facts(plan, arms),
        curves=[Figure(plan.out / budget_picture(unit), f"Held-out loss as a next-token predictor over {UNITS[unit]} "
                       f"of training.", f"Held-out loss of each arm over {UNITS[unit]}") for unit in BUDGETS],
        depths=Figure(plan.out / DEPTH, f"Held-out loss by depth, after training.{band}", "Held-out loss by depth"))


def _samples(arms: Sequence[ArmSummary]) -> dict[str, list[tuple[str, str]]]:
    """A few of each arm's first run, at the depth that stands for it."""
    found = {}
    for arm in arms:
        run = arm.runs[0]
        depth = run.place.text_depth
        found[f"{arm.name}, seed {run.place.seed}, depth {depth}"] = [
            (sample["prompt"], sample["text"]) for sample in run.samples if sample["depth"] == depth][:NUM_SAMPLES]
    return found


def _facts(plan: Plan, arms: Sequence[ArmSummary]) -> dict[str, str]:
    """Where the runs come from, by their stamps; several values where they differ."""
    stamps = [read_stamp(run.place.run) for arm in arms for run in arm.runs]
    commits = [f"{stamp['git_sha'][:12]}{' with changes' if stamp['git_dirty'] else ''}" for stamp in stamps
               if stamp.get("git_sha")]
    versions = [", ".join(f"{name} {version}" for name, version in stamp.get("versions", {}).items() if version)
                for stamp in stamps]
    where = machine(plan.config.training.threads or torch.get_num_threads())
    return {"machine": f"{where['processor']}, {where['logical_cpus']} CPUs; {_all(s.get('machine') for s in stamps)}",
            "device": f"{_all(s.get('device') for s in stamps)}, {_all(s.get('threads') for s in stamps)} threads",
            "versions": _all(versions), "commit": _all(commits) or "not known",
            "seeds": ", ".join(map(str, range(plan.num_seeds))), "runs": str(plan.out),
            "trained": f"{min(s.get('created', '') for s in stamps)} and after"}


def _all(values: Iterable[Any]) -> str:
    return "; ".join(sorted({str(value) for value in values}))


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

