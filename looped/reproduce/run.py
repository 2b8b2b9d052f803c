"""Runs a suite: trains and measures one comparison per entry, and rewrites the table after each. The same command
resumes an interrupted suite.

    OUT/[ENTRY/]                 a comparison (looped.compare.plan), and the helper runs trained before it
    OUT/NAME.md, NAME.jsonl      the table, and its rows
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from looped.compare import compared
from looped.compare.plan import Plan, RunSpec
from looped.compare.report import ROWS
from looped.compare.runner import Trained
from looped.config.arms import Arm
from looped.devices import Placement
from looped.errors import UserError
from looped.evaluation.result_files import writing_to
from looped.reproduce.plan import Entry, Order, Result, plan_entries
from looped.reproduce.suite import Evaluation
from looped.reproduce.table import report
from looped.training.checkpoint import list_checkpoints, newest_hash, write_text
from looped.training.train import train

Row = dict[str, Any]
KEPT = "eval/reproduce.json"
"""File in a run's folder with its evaluations: command -> rows."""


def reproduce(order: Order) -> int:
    """Run a suite and print its table; returns the exit code. Raises UserError for the first failure, after everything
    else is done."""
    results: list[Result] = []
    for entry in plan_entries(order):
        results.append(run_entry(order, entry))
        if results[-1].stopped:
            print("stopped; run the same command again to resume")
            return results[-1].stopped
        _write(order, results)
    if any(result.rows for result in results):
        print(f"\n{report(order, results)}\n\n{order.out}")
    failed = [f"{result.entry.name or order.path.stem}: {arm}: {why}" for result in results
              for arm, why in result.missing.items() if arm not in result.entry.refused]
    if failed:
        raise UserError(f"{failed[0]}; finished runs are kept in {order.out}; run the same command again to resume")
    return 0


def _write(order: Order, results: Sequence[Result]) -> None:
    rows = [({"entry": result.entry.name} if result.entry.name else {}) | row for result in results
            for row in result.rows]
    if rows:
        with writing_to(order.out):
            write_text(order.out / f"{order.path.stem}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_text(order.out / f"{order.path.stem}.md", report(order, results) + "\n")


def run_entry(order: Order, entry: Entry) -> Result:
    """Train and measure one entry. Failures are recorded in the result, so that the other entries still run."""
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
    """(arm, error of its first failed run), for each arm with a failed run."""
    for arm in plan.arms:
        said = [trained.failures[place.name] for place in plan.places
                if place.arm is arm and place.name in trained.failures]
        if said:
            yield arm.name, f"{plan.num_seeds - len(said)} of {plan.num_seeds} seeds have finished: {said[0]}"


def _about(arm: Arm) -> Row:
    """A row with the full text of the arm and the number of core layers that a training step trains."""
    c = arm.config
    layers = c.model.num_core_layers / (c.blocks.num if c.rule.trains_one_block(c) else 1)
    return {"kind": "arm", "arm": arm.name, "text": arm.text, "mean": layers, "num": 1}


# ---- with looped eval ------------------------------------------------------------------------------------------------


def _evaluated(order: Order, entry: Entry, place: RunSpec) -> list[Row]:
    """Rows of the evaluations that the scale requests in addition to the comparison."""
    who, depths = {"kind": "evaluation", "arm": place.arm.name, "seed": place.seed}, entry.depths[place.arm.name]
    return [who | step.in_rows | row | ({"at": "deepest"} if row.get("depth") == max(depths) else {})
            for step in order.scale.evaluate if step.applies_to(place.arm.name)
            for row in _rows_of(place, depths, _options(order, entry, step), _read(entry, step))]


def _options(order: Order, entry: Entry, step: Evaluation) -> list[str]:
    """Flags for `looped eval`; names of helpers become their folders, and the user's evaluation settings override those
    of the suite."""
    own = {name: value for name, value in order.asked.settings.items() if name.startswith("evaluation.")}
    settings = {name: json.dumps(value) for name, value in step.settings.items()} | own
    flags = {flag: str(entry.plan.out / name) if name in entry.helpers else name for flag, name in step.flags.items()}
    return [f"--{name}={value}" for name, value in (flags | settings).items()]


def _read(entry: Entry, step: Evaluation) -> list[str]:
    """Hashes of the helpers that an evaluation reads."""
    return [newest_hash(entry.plan.out / name) for name in step.flags.values() if name in entry.helpers]


def _rows_of(place: RunSpec, depths: Sequence[int], options: Sequence[str], read: Sequence[str]) -> list[Row]:
    """Rows of one evaluation, cached per checkpoint of the run and of the helpers that it reads (`read`). Raises
    UserError with the message of `looped eval`."""
    path, kept = place.run / KEPT, {}
    with suppress(OSError, ValueError):
        kept = json.loads(path.read_text(encoding="utf-8"))
    command = ["eval", str(place.run), f"--depths={','.join(map(str, depths))}", *options]
    key = " ".join([list_checkpoints(place.run)[0].name, *command, *read])
    if key not in kept:
        print(f"evaluating {place.name}: looped {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, "-m", "looped.cli", *command, "--json"], capture_output=True, text=True,
                              check=False)
        if done.returncode:
            raise UserError(f"looped {' '.join(command)}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        kept[key] = list(map(json.loads, done.stdout.splitlines()))
        write_text(path, json.dumps(kept))
    return kept[key]
