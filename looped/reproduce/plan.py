"""From a suite to runs: the comparison of every entry, and what is trained before it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from looped.compare.plan import Plan, make_plan
from looped.config import Config, load_config
from looped.config.arms import parse_arm
from looped.config.reads import notice_arms
from looped.errors import UserError, did_you_mean
from looped.reproduce.suite import Helper, Layer, Scale, Suite, find_config, last, load_suite, merged

OWN = {"objective": "every arm has its own", "seed": "every run has its own",
       "training.budget": "--amount says it", "training.budget_unit": "the suite says it"}
"""Settings that a suite decides in any case."""


@dataclass(frozen=True)
class Order:
    """What is asked of the suite in a file: which scale, arms and entries of it, into which folder. `amount`, `depths`:
    None for those of the suite. `settings`: of all arms, as the user wrote them."""

    path: Path
    suite: Suite
    scale: str
    out: Path
    seeds: int
    jobs: int
    arms: Sequence[str]
    entries: Sequence[str]
    amount: int | None
    depths: Sequence[int] | None
    settings: Mapping[str, str]

    @property
    def at_scale(self) -> Scale:
        return self.suite.scales[self.scale]

    def layers(self, entry: str) -> tuple[Layer, ...]:
        """What the runs of an entry are given, the last above the others."""
        return self.suite, self.suite.entries[entry], self.at_scale


@dataclass(frozen=True)
class Entry:
    """One comparison, `plan` being None where every arm is `refused` (arm -> why). `depths` of each arm."""

    name: str
    plan: Plan | None
    refused: Mapping[str, str]
    depths: Mapping[str, Sequence[int]]


def make_order(path: Path, *, scale: str, **asked: Any) -> Order:
    """The order of a command; `asked` are the other fields, None where the user has not said. Raises UserError."""
    suite = load_suite(path)
    if scale not in suite.scales:
        raise UserError(f"--scale {scale} is unknown{did_you_mean(scale, suite.scales)}")
    chosen = suite.scales[scale]
    return Order(path, suite, scale, **asked | {
        "out": asked["out"] or Path("runs") / f"{path.stem.replace('_', '-')}-{scale}",
        "seeds": asked["seeds"] or suite.seeds,
        "arms": _chosen("--arms", asked["arms"], suite.arms, chosen.arms),
        "entries": _chosen("--entries", asked["entries"], suite.entries, chosen.entries)})


def _chosen(flag: str, text: str | None, known: Mapping[str, Any], usual: Sequence[str] | None) -> list[str]:
    """Names of a comma-separated list, the usual ones without it. Raises UserError."""
    if text is None:
        return list(usual or known)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known or not name:
            raise UserError(f"{flag} {text}: '{name}' is unknown{did_you_mean(name, known)}")
    return list(dict.fromkeys(names))


def plan_entries(order: Order) -> list[Entry]:
    """The comparisons. Raises UserError, before anything is trained, for settings that are none or would be lost, and
    for arms that a suite of one entry refuses; where there are several, an arm may apply to some of them."""
    for name in order.settings:
        _check_free(order, name)
    entries = [_plan_entry(order, name) for name in order.entries]
    refused = [f"arm '{arm}': {why}" for entry in entries for arm, why in entry.refused.items()]
    if refused and (len(order.suite.entries) == 1 or not any(entry.plan for entry in entries)):
        raise UserError(refused[0])
    return entries


def _check_free(order: Order, name: str) -> None:
    """Raises UserError for a setting of the user's that no arm, or not every one, would have."""
    why = OWN.get(name) or next((f"arm '{arm}' sets it for itself" for entry in order.entries for arm in order.arms
                                 if name in own_settings(order, arm, entry)), None)
    if why is not None:
        raise UserError(f"--{name} {order.settings[name]} would be lost, since {why}; leave it out, or give the arms "
                        f"to looped compare")


def own_settings(order: Order, arm: str, entry: str) -> dict[str, str]:
    """Those of its text, with what an entry and the scale have for it above them."""
    words = dict(word.partition("=")[::2] for word in order.suite.arms[arm].text.split()[1:])
    layers = [layer.own.get(arm, {}) for layer in order.layers(entry)]
    return words | {name: _shown(value) for layer in layers for name, value in layer.items()}


def arm_text(order: Order, arm: str, entry: str) -> str:
    """The arm as `looped compare` reads it, by its name."""
    objective = order.suite.arms[arm].text.split()[0]
    return " ".join([f"{arm}={objective}", *map("=".join, own_settings(order, arm, entry).items())])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _plan_entry(order: Order, name: str) -> Entry:
    layers = order.layers(name)
    settings = _settings_of_user(order, name)
    config = load_config(find_config(last(layers, "config"), order.path), merged(layers, "settings") | settings)
    depths = {arm: order.depths or order.suite.arms[arm].depths or last(layers, "depths") or config.evaluation.depths
              for arm in order.arms}
    texts, refused = {arm: arm_text(order, arm, name) for arm in order.arms}, {}
    for arm, text in texts.items():
        try:
            parse_arm(config, text)
        except UserError as error:
            refused[arm] = str(error).removeprefix(f"arm '{arm}': ")
    applies = [text for arm, text in texts.items() if arm not in refused]
    if not applies:
        return Entry(name, None, refused, depths)
    plan = make_plan(config, ",".join(applies), unit=order.suite.budget, amount=order.amount or last(layers, "amount"),
                     num_seeds=order.seeds, depths=sorted(set().union(*depths.values())), out=order.out / name)
    notice_arms(plan.arms, settings)
    arms = [replace(arm, config=arm.config.replace(**{
        "training.budget": plan.amount * order.suite.arms[arm.name].budget})) for arm in plan.arms]
    return Entry(name, replace(plan, arms=arms), refused, depths)


def _settings_of_user(order: Order, name: str) -> dict[str, str]:
    """What the user has set for an entry: what others need and this one does not is not for it. Raises UserError where
    something is missing."""
    needs = merged(order.layers(name), "needs")
    for setting, what in needs.items():
        if setting not in order.settings:
            out = f", or leave {name} out of --entries" if name else ""
            raise UserError(f"{name or order.path.stem} at scale {order.scale} needs {what}; give --{setting}{out}")
    others = {setting for entry in order.suite.entries.values() for setting in entry.needs} - needs.keys()
    return {setting: value for setting, value in order.settings.items() if setting not in others}


def helper_config(order: Order, helper: Helper, plan: Plan) -> Config:
    """Of a run that is trained before the arms of a comparison, on the data that they have."""
    arms = plan.config.model_dump(mode="json")
    shared = {name: reduce(lambda part, key: part[key], name.split("."), arms) for name in helper.shares}
    budget = {} if helper.budget is None else {"training.budget": plan.amount * helper.budget}
    start = None if helper.config is None else find_config(helper.config, order.path)
    return load_config(start, shared | helper.settings | budget)
