"""Shapes are checked in tests: the hook must be there before any module of looped is imported, users never meet it.

A worker has one thread, and so have the processes it starts: several with as many threads as cores wait for each other.
"""

import gc
import os
import sys
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import pytest
from browsers import find_browser
from jaxtyping import config, install_import_hook

gc.set_threshold(200_000, 30, 30)  # as the command line does: a tenth of the suite's time went into empty searches

CHECKED = ["looped.rng", "looped.nn", "looped.diffusion", "looped.models", "looped.objectives", "looped.evaluation",
           "looped.data", "looped.training", "looped.hub", "looped.compare"]
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")  # 1 is a float


class FirstCalls(type(config)):
    """Only the first `LIMIT` calls of a function in a test are checked: an eighth of the suite's time were all."""

    LIMIT = 20

    @property
    def jaxtyping_disable(self):
        if self.off:
            return True
        function = sys._getframe(1).f_locals.get("fn")  # of jaxtyping's wrapper; without it all calls are checked
        code = getattr(function, "__code__", None)
        self.calls[code] += code is not None
        return self.calls[code] > self.LIMIT

    @jaxtyping_disable.setter
    def jaxtyping_disable(self, value):
        self.off, self.calls = value, Counter()


config.__class__ = FirstCalls
config.update("jaxtyping_disable", False)


@pytest.fixture
def unchecked():
    """What users run, without the checks: for wrong shapes given on purpose, for torch.compile, which cannot look into
    them, and where a test repeats the same calls hundreds of times. Where all of a module asks for it, so do the
    fixtures that its tests share (`pytest_runtest_setup`)."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Fixtures of a module or a session are made before `unchecked`, which is a test's own."""
    marks = item.getparent(pytest.Module).iter_markers("usefixtures")
    config.update("jaxtyping_disable", any("unchecked" in mark.args for mark in marks))
    try:
        return (yield)
    except BaseException:
        config.update("jaxtyping_disable", False)
        raise


@pytest.fixture(scope="session")
def chromium():
    """A browser to show pages in."""
    return find_browser()


@pytest.fixture(scope="session")
def in_place():
    """`with in_place():` comparisons train and benches step in this process; the processes have tests of their own."""
    from in_place import SteppedInPlace, TrainedInPlace

    @contextmanager
    def patched():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("looped.compare.runner.subprocess", SimpleNamespace(Popen=TrainedInPlace, DEVNULL=None))
            patch.setattr("looped.cost.bench_step.Arm", SteppedInPlace)
            yield

    return patched
