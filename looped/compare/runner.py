"""Trains the runs of a comparison, each in its own process. Finished runs are kept, interrupted ones resume.

Each process has its own process group, so that Ctrl-C reaches it only once, through the parent: it finishes its step,
saves and exits.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from looped.compare.plan import AGAIN, Plan, RunSpec, fixed
from looped.config import load_config
from looped.data.from_config import find_data, located
from looped.errors import KILLED, UserError
from looped.training.checkpoint import list_checkpoints, newest_good
from looped.training.counters import Counters
from looped.training.data_identity import recall_data
from looped.training.runs import started_in
from looped.training.signals import Caught, catch_signals

POLL_SECONDS = 0.1

Say = Callable[[str], None]


@dataclass
class Trained:
    """The outcome of training: the finished runs, the failed ones (name -> reason), and the signal that stopped it."""

    finished: list[RunSpec] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    signal: int = 0


def train_all(plan: Plan, *, jobs: int = 1, say: Say = print) -> Trained:
    """Train every run of the plan, `jobs` at a time."""
    queue = [place for place in plan.places if not is_finished(place)]
    result = Trained([place for place in plan.places if place not in queue])
    if queue:
        check_data(plan)
    if result.finished:
        say(f"{len(result.finished)} of {len(plan.places)} runs are trained already")
    with ExitStack() as stack:
        caught, running = stack.enter_context(catch_signals()), []
        stack.callback(lambda: [child.kill() for child in running])
        while running or (queue and not caught.number):
            while queue and len(running) < jobs and not caught.number:
                running.append(Child(plan, queue.pop(0)))
                say(f"training {running[-1].place.name}: {running[-1].log}")
            _pass_on(caught, running)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                _take(child, result, say, stopped=bool(caught.number))
            time.sleep(POLL_SECONDS)
        result.signal = caught.number
    result.finished.sort(key=plan.places.index)
    return result


def check_data(plan: Plan) -> None:
    """Raises UserError if trained runs of the plan used other data than the remaining runs would now use."""
    trained = [place for place in plan.places if list_checkpoints(place.run)]
    if trained:
        found = find_data(located(plan.config, started_in(trained[0].run)))
        for place in trained:
            if (good := newest_good(place.run, lambda line: None)) is not None:
                recall_data(place.run, good[1]).check(found, place.run, AGAIN)


def is_finished(place: RunSpec) -> bool:
    """True if the run was trained with this config, has spent its budget and is saved."""
    if not (place.run / "config.yaml").is_file():
        return False
    try:
        if fixed(load_config(place.run / "config.yaml")) != fixed(place.config):
            return False
        found = newest_good(place.run, lambda line: None)
    except UserError:
        return False  # `looped train` reports the error
    if found is None:
        return False
    return Counters.of(found[1]).fraction(place.config.training) >= 1


class Child:
    """`looped train` of one run in the background, with its output in a log file."""

    def __init__(self, plan: Plan, place: RunSpec):
        self.place = place
        self.log: Path = plan.log(place)
        self.told: int = 0
        self.start: int = self.log.stat().st_size if self.log.exists() else 0
        command = [sys.executable, "-m", "looped.cli", "train", plan.yaml(place.arm), "--run", place.run,
                   "--seed", place.seed]
        with open(self.log, "ab") as log:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)

    def tell(self, number: int) -> None:
        """Pass a signal to the process, only once."""
        if not self.told:
            self.told = number
            with suppress(ValueError):  # Windows cannot send SIGINT to one process, only Ctrl-C to the console
                self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def lines(self) -> list[str]:
        """Non-empty lines that this process wrote to the log."""
        with open(self.log, "rb") as log:
            log.seek(self.start)
            return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]

    def cause(self) -> str:
        """The reason for the failure, in one sentence."""
        code, said = self.process.returncode, self.lines()
        if code == KILLED:
            return "the process was killed, most likely for lack of memory; try a smaller training.batch_size"
        own = [line.removeprefix("looped: ") for line in said if line.startswith("looped: ")]
        return own[-1] if own else f"{said[-1][:200] if said else 'no output'} (exit code {code}, {self.log})"


def _pass_on(caught: Caught, running: Sequence[Child]) -> None:
    if caught.number:
        for child in running:
            child.tell(caught.number)


def _take(child: Child, result: Trained, say: Say, *, stopped: bool) -> None:
    """Record the outcome of a run."""
    if child.process.returncode == 0:
        result.finished.append(child.place)
        say(f"  {child.place.name}: {child.lines()[-1]}")
    elif stopped:
        say(f"  {child.place.name}: stopped; run the same command again to resume")
    else:
        result.failures[child.place.name] = child.cause()
        say(f"  {child.place.name} failed: {result.failures[child.place.name]}")
