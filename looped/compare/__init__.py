"""`looped compare`: train several objectives (arms) at one budget, measure them on the same text, problems or images,
and write a report."""

from looped.compare.comparison_kinds import kind_of
from looped.compare.plan import Plan, make_plan, write_configs
from looped.compare.report import write_report
from looped.compare.runner import Trained, train_all
from looped.devices import CPU, Placement
from looped.errors import UserError

__all__ = ["Plan", "compare", "compared", "make_plan"]


def compare(plan: Plan, *, jobs: int = 1, placement: Placement = CPU) -> int:
    """Train all arms, measure them on a device and report; returns the exit code. Raises UserError for the first run
    that failed, after reporting on the finished ones."""
    trained = compared(plan, jobs=jobs, placement=placement)
    if trained.signal:
        print("stopped; run the same command again to resume")
        return 128 + trained.signal
    if trained.failures:
        name, why = next(iter(trained.failures.items()))
        rest = f" (and {len(trained.failures) - 1} more failed)" if len(trained.failures) > 1 else ""
        raise UserError(f"{name}: {why}{rest}; the finished runs are kept in {plan.out}; run the same command again to "
                        f"resume")
    return 0


def compared(plan: Plan, *, jobs: int = 1, placement: Placement = CPU) -> Trained:
    """Train all arms, then measure and report on the finished runs unless training was stopped. Raises UserError if
    the plan cannot be carried out."""
    kind = kind_of(plan.config)
    kind.check(plan)
    write_configs(plan)
    trained = train_all(plan, jobs=jobs)
    if trained.finished and not trained.signal:
        measure = kind.measurer(plan, trained.finished, placement)
        print("\n" + write_report(plan, kind, [measure(place) for place in trained.finished]) + f"\n\n{plan.out}")
    return trained
