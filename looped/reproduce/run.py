"""Trains and measures what a suite says: one comparison after another, the table anew after each. The same command goes
on where it was interrupted.

    OUT/[ENTRY/]                 a comparison (looped.compare.plan), and the runs that are trained before it
    OUT/NAME.md, NAME.jsonl      the table, and every figure
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from looped.compare import compared
from looped.compare.plan import Place, Plan
from looped.compare.report import ROWS
from looped.compare.runner import Trained
from looped.config.arms import Arm
from looped.devices import Placement
from looped.errors import UserError
from looped.evaluation.store import writing_to
from looped.reproduce.plan import Entry, Order, Result, plan_entries
from looped.reproduce.suite import Evaluation
from looped.reproduce.table import report
from looped.training.checkpoint import list_checkpoints, write_text
from looped.training.train import train

Row = dict[str, Any]
KEPT = "eval/reproduce.json"
"""Below a run's folder: its evaluations, by their commands."""


def reproduce(order: Order) -> int:
    """The exit code; the table is printed. Raises UserError, for the first failure after all that could be done."""
    results: list[Result] = []
    for entry in plan_entries(order):
        results.append(run_entry(order, entry))
        if results[-1].stopped:
            print("stopped; the same command goes on")
            return results[-1].stopped
        _write(order, results)
    if any(result.rows for result in results):
        print(f"\n{report(order, results)}\n\n{order.out}")
    failed = [f"{result.entry.name or order.path.stem}: {arm}: {why}" for result in results
              for arm, why in result.missing.items() if arm not in result.entry.refused]
    if failed:
        raise UserError(f"{failed[0]}; what has finished is kept in {order.out}, and the same command goes on")
    return 0


def _write(order: Order, results: Sequence[Result]) -> None:
    rows = [({"entry": result.entry.name} if result.entry.name else {}) | row for result in results
            for row in result.rows]
    if rows:
        with writing_to(order.out):
            write_text(order.out / f"{order.path.stem}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_text(order.out / f"{order.path.stem}.md", report(order, results) + "\n")


def run_entry(order: Order, entry: Entry) -> Result:
    """Everything of one entry. What cannot be is noted, so that the others are done."""
    result = Result(entry, missing={arm: f"does not apply: {why}" for arm, why in entry.refused.items()})
    if (plan := entry.plan) is None:
        return result
    try:
        for name, config in entry.helpers.items():
            result.stopped = result.stopped or train(config, plan.out / name).exit_code
        if result.stopped:
            return result
        trained = compared(plan, jobs=order.asked.jobs, placement=Placement.of("auto", "fp32"))
        if trained.signal:
            result.stopped = 128 + trained.signal
            return result
        result.missing |= _failures(plan, trained)
        if trained.finished:
            result.rows += map(json.loads, (plan.out / ROWS).read_text(encoding="utf-8").splitlines())
            result.rows += map(_about, plan.arms)
        for place in trained.finished:
            result.rows += _evaluated(order, entry, place)
    except UserError as error:
        result.missing |= {arm.name: str(error) for arm in plan.arms}
    return result


def _failures(plan: Plan, trained: Trained) -> Iterator[tuple[str, str]]:
    """(arm, what its first run said that failed)."""
    for arm in plan.arms:
        said = [trained.failures[place.name] for place in plan.places
                if place.arm is arm and place.name in trained.failures]
        if said:
            yield arm.name, f"{plan.num_seeds - len(said)} of {plan.num_seeds} seeds have finished: {said[0]}"


def _about(arm: Arm) -> Row:
    """The arm in full, and the layers of its core that a step runs."""
    c = arm.config
    layers = c.step_layers if c.rule.takes_turns(c) else c.model.num_core_layers
    return {"kind": "arm", "arm": arm.name, "text": arm.text, "mean": layers, "num": 1}


# ---- by looped eval --------------------------------------------------------------------------------------------------


def _evaluated(order: Order, entry: Entry, place: Place) -> list[Row]:
    """Rows of the evaluations that the scale asks for besides the comparison."""
    who, depths = {"kind": "evaluation", "arm": place.arm.name, "seed": place.seed}, entry.depths[place.arm.name]
    return [who | step.flags | row | ({"at": "deepest"} if row.get("depth") == max(depths) else {})
            for step in order.scale.evaluate for row in _rows_of(place, depths, _options(order, entry, step))]


def _options(order: Order, entry: Entry, step: Evaluation) -> list[str]:
    """Of `looped eval`, where helpers are folders; evaluation settings of the user are above those of the suite."""
    own = {name: value for name, value in order.asked.settings.items() if name.startswith("evaluation.")}
    settings = {name: json.dumps(value) for name, value in step.settings.items()} | own
    flags = {flag: str(entry.plan.out / name) if name in entry.helpers else name for flag, name in step.flags.items()}
    return [f"--{name}={value}" for name, value in (flags | settings).items()]


def _rows_of(place: Place, depths: Sequence[int], options: Sequence[str]) -> list[Row]:
    """Rows of one evaluation, kept until the run has other weights. Raises UserError in its words."""
    path, kept = place.run / KEPT, {}
    with suppress(OSError, ValueError):
        kept = json.loads(path.read_text(encoding="utf-8"))
    command = ["eval", str(place.run), f"--depths={','.join(map(str, depths))}", *options]
    key = " ".join([list_checkpoints(place.run)[0].name, *command])
    if key not in kept:
        print(f"evaluating {place.name}: looped {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, "-m", "looped.cli", *command, "--json"], capture_output=True, text=True,
                              check=False)
        if done.returncode:
            raise UserError(f"looped {' '.join(command)}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
        kept[key] = list(map(json.loads, done.stdout.splitlines()))
        write_text(path, json.dumps(kept))
    return kept[key]
