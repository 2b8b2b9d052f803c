"""Settings that may change when a run is resumed, and the checkpoint from which a new budget is valid.

Three kinds may change: settings that do not affect the weights, `training.precision` between auto and what it stands
for, and `training.budget`. The learning rate depends on the fraction of the budget that is spent (`optim.lr_factor`),
and so does the loop of `recurrence.stages` and `.from_share`. A checkpoint is valid for a new budget if no step before
it depends on the old one: always under `constant`, before the decay under `wsd`, never under `cosine`, and before the
end of the first stage. The newest such checkpoint is always kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looped.config import Config
from looped.errors import UserError
from looped.training.checkpoint import DamagedError, check, list_checkpoints, step_of
from looped.training.counters import Counters
from looped.training.optim import decay_start

BUDGET = "training.budget"
PRECISION = "training.precision"

FREE_AT_RESTART = ("training.log_every", "training.eval_every", "training.num_evals", "training.sample_every",
                   "training.checkpoint_every", "training.keep_checkpoints", "training.background_saves",
                   "training.wandb", "training.threads",
                   "training.other_data", "training.lost_after", "training.shard", "evaluation", "data.cache_dir",
                   "denoise.guidance", "noprop.solver")
"""Settings or sections that do not affect a run's weights."""


@dataclass(frozen=True)
class Change:
    """A setting with its old and new value."""

    setting: str
    old: Any
    new: Any


def is_one_of(name: str, settings: tuple[str, ...]) -> bool:
    """True if a dotted name is among settings, or in a section among them."""
    return any(name == each or name.startswith(f"{each}.") for each in settings)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    """The settings in which two configs, as plain values, differ."""
    for key in old | new:
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield Change(f"{prefix}{key}", before, now)


def changes_of(path: Path, old: Config, new: Config, *, same_dtype: bool) -> list[Change]:
    """Settings that differ between the old and the new config of a run. Raises UserError for the first one that cannot
    change. same_dtype: matrix products keep their dtype, so training.precision may change too."""
    changes = list(differences(old.model_dump(mode="json"), new.model_dump(mode="json")))
    free = (BUDGET, *FREE_AT_RESTART, *([PRECISION] if same_dtype else []))
    for change in changes:
        if not is_one_of(change.setting, free):
            raise UserError(f"run {path} was started with {change.setting} {change.old!r}, now it is {change.new!r}; "
                            f"choose another --run, or remove the folder")
    return changes


def start_of(path: Path, old: Config, new: Config) -> tuple[int, int]:
    """(step of the newest intact checkpoint that is valid for the new budget, step of the newest intact checkpoint).

    Raises UserError if the new budget is already spent, or if the learning rate has followed the old one before every
    checkpoint.
    """
    unit, before, now = old.training.budget_unit, old.training.budget, new.training.budget
    found = [(counters.step, counters.spent(unit)) for counters in _whole(path)]
    if not found:  # the trainer reports the damage
        return (step_of(list_checkpoints(path)[0]),) * 2
    step, spent = found[0]
    if before == now:
        return step, step
    changed = f"run {path} was started with {BUDGET} {before}, now it is {now}"
    if spent >= now:
        raise UserError(f"{changed}, and {spent:g} {unit} are spent already at step {step}; set it higher than that, "
                        f"or choose another --run")
    flat, free = decay_start(old.optim), same_until(old)
    kept = [each for each, spent in found if spent / min(before, now) <= free]
    if not kept and free < flat:
        raise UserError(f"{changed}, but its loop begins or changes after {free:.0%} of the budget, which every "
                        f"checkpoint that is kept has passed; choose another --run")
    if not kept:
        begun, told = (("follows the budget from the first step on", "with optim.schedule wsd or constant a run can be "
                        "extended") if flat == 0 else
                       ("has begun its decay in every checkpoint that is kept", f"to extend a run, let "
                        f"training.checkpoint_every save one in the first {flat:.0%} of the budget"))
        raise UserError(f"{changed}, but optim.schedule {old.optim.schedule} {begun}; choose another --run and give it "
                        f"this one as training.warm_start ({told})")
    return kept[0], step


def same_until(config: Config) -> float:
    """The fraction of the budget up to which no step depends on the size of the budget."""
    return min(decay_start(config.optim), config.recurrence.first_end)


def _whole(path: Path) -> Iterator[Counters]:
    """The counters of a run's intact checkpoints, newest first."""
    for checkpoint in list_checkpoints(path):
        try:
            yield Counters.of(check(checkpoint))
        except DamagedError:
            continue
