"""Processes that a command starts, run in the test's own, which imports torch once: a test of their figures needs no
more, and one that is of the processes leaves these alone. As there, no shapes are checked in them."""

import io
import json
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from jaxtyping import config as checks

from looped.cli import main
from looped.config import load_config


@contextmanager
def unchecked():
    before = checks.jaxtyping_disable
    checks.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        checks.update("jaxtyping_disable", before)


class TrainedInPlace:
    """`looped train` of a comparison, in the place of its `subprocess.Popen`."""

    def __init__(self, command, *, stdout, **_):
        said = io.StringIO()
        with unchecked(), redirect_stdout(said), redirect_stderr(said):
            self.returncode = main(command[3:])
        stdout.write(said.getvalue().encode())

    def poll(self):
        return self.returncode

    def kill(self):
        pass

    def wait(self):
        pass


class SteppedInPlace:
    """The arm of a bench, in place of `looped.cost.arm_timing.Arm`; its settings take the same way, through JSON."""

    def __init__(self, name, config, threads):
        from looped.cost.arm_timing import Stepper

        self.stepper = Stepper(load_config(None, json.loads(json.dumps(config.model_dump(mode="json")))))

    def ask(self, command):
        with unchecked():
            return self.stepper.step() if command == "step" else self.stepper.figures(1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass
