"""Objectives side by side: `looped compare` trains arms at one budget, measures them on the same text, problems or
images, and reports."""

from looped.compare.kinds import kind_of
from looped.compare.plan import Plan, make_plan, write_configs
from looped.compare.report import write_report
from looped.compare.runner import Trained, train_all
from looped.devices import CPU, Placement
from looped.errors import UserError

__all__ = ["Plan", "compare", "compared", "make_plan"]


def compare(plan: Plan, *, jobs: int = 1, placement: Placement = CPU) -> int:
    """Train, measure on a device and report; the exit code. Raises UserError for the first arm that failed, after
    reporting on the finished ones."""
    trained = compared(plan, jobs=jobs, placement=placement)
    if trained.signal:
        print("stopped; the same command goes on")
        return 128 + trained.signal
    if trained.failures:
        name, why = next(iter(trained.failures.items()))
        rest = f" (and {len(trained.failures) - 1} more failed)" if len(trained.failures) > 1 else ""
        raise UserError(f"{name}: {why}{rest}; the finished runs are kept in {plan.out}, and the same command goes on")
    return 0


def compared(plan: Plan, *, jobs: int = 1, placement: Placement = CPU) -> Trained:
    """Train, and unless that was stopped, measure and report on what has finished. Raises UserError where the plan
    cannot be carried out."""
    kind = kind_of(plan.config)
    kind.check(plan)
    write_configs(plan)
    trained = train_all(plan, jobs=jobs)
    if trained.finished and not trained.signal:
        measure = kind.measurer(plan, trained.finished, placement)
        print("\n" + write_report(plan, kind, [measure(place) for place in trained.finished]) + f"\n\n{plan.out}")
    return trained
