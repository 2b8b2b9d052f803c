"""From a suite to its runs: one comparison per entry, and the helper models trained before it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from looped.compare.plan import Plan, make_plan
from looped.config import Config, load_config
from looped.config.arms import parse_arm, words_of
from looped.config.unread_settings import notice_arms
from looped.errors import UserError, did_you_mean
from looped.reproduce.suite import Helper, Layer, Scale, Suite, find_config, last, merged

OWN = {"objective": "every arm has its own", "seed": "every run has its own",
       "training.budget": "--amount sets it", "training.budget_unit": "the suite sets it"}
"""Settings that a suite always decides -> the reason."""


@dataclass(frozen=True)
class Asked:
    """Options of `looped reproduce`; None keeps the suite's value. `arms`, `entries`: comma-separated names.
    `settings`: for all arms, as typed."""

    scale: str = "cpu"
    out: Path | None = None
    seeds: int | None = None
    jobs: int = 2
    arms: str | None = None
    entries: str | None = None
    amount: int | None = None
    depths: Sequence[int] | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """A suite, its file and the user's options. Raises UserError for unknown names."""

    path: Path
    suite: Suite
    asked: Asked
    scale: Scale = field(init=False)
    arms: list[str] = field(init=False)
    entries: list[str] = field(init=False)
    seeds: int = field(init=False)
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        asked, suite = self.asked, self.suite
        if asked.scale not in suite.scales:
            raise UserError(f"--scale {asked.scale} is unknown{did_you_mean(asked.scale, suite.scales)}")
        scale = suite.scales[asked.scale]
        found = {"scale": scale, "arms": _chosen("--arms", asked.arms, suite.arms, scale.arms),
                 "entries": _chosen("--entries", asked.entries, suite.entries, scale.entries),
                 "seeds": asked.seeds or suite.seeds,
                 "out": asked.out or Path("runs") / f"{self.path.stem.replace('_', '-')}-{asked.scale}"}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def layers(self, entry: str) -> tuple[Layer, ...]:
        """The sources of settings for the runs of an entry; later ones override earlier ones."""
        return self.suite, self.suite.entries[entry], self.scale

    def own(self, arm: str, entry: str) -> dict[str, str]:
        """The settings of one arm in an entry, beyond its text, which they override."""
        return {name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
                for layer in self.layers(entry) for name, value in layer.own.get(arm, {}).items()}


def _chosen(flag: str, text: str | None, known: Mapping[str, Any], usual: Sequence[str] | None) -> list[str]:
    """The names in a comma-separated list, or the default ones if it is None. Raises UserError."""
    if text is None:
        return list(usual or known)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known or not name:
            raise UserError(f"{flag} {text}: '{name}' is unknown{did_you_mean(name, known)}")
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Entry:
    """One comparison. `plan`: None if every arm is `refused` (arm -> reason). `depths`: arm -> depths. `helpers`:
    configs of the models trained before it."""

    name: str
    plan: Plan | None
    refused: Mapping[str, str]
    depths: Mapping[str, Sequence[int]]
    helpers: Mapping[str, Config] = field(default_factory=dict)


@dataclass
class Result:
    """The outcome of an entry. `missing`: arm -> reason why values of it are missing; `stopped`: exit code of an
    interrupted run, else 0."""

    entry: Entry
    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    stopped: int = 0


def plan_entries(order: Order) -> list[Entry]:
    """The comparison of each entry. Raises UserError, before anything is trained, for settings that do not exist or
    would have no effect, and for arms that do not apply; with several entries, an arm may apply to only some."""
    for name, value in order.asked.settings.items():
        why = OWN.get(name) or next((f"arm '{arm}' sets it itself" for entry in order.entries for arm in order.arms
                                     if name in _own_settings(order, arm, entry)), None)
        if why is not None:
            raise UserError(f"--{name} {value} would have no effect, since {why}; leave it out, or run the arms with "
                            f"looped compare")
    entries = [_plan_entry(order, name) for name in order.entries]
    refused = [f"arm '{arm}': {why}" for entry in entries for arm, why in entry.refused.items()]
    if refused and (len(order.suite.entries) == 1 or not any(entry.plan for entry in entries)):
        raise UserError(refused[0])
    return entries


def _own_settings(order: Order, arm: str, entry: str) -> dict[str, str]:
    """Settings of one arm: those of its text, overridden by the `own` settings of the suite, entry and scale."""
    return dict(word.partition("=")[::2] for word in words_of(order.suite.arms[arm].text)[1:]) | order.own(arm, entry)


def _plan_entry(order: Order, name: str) -> Entry:
    layers, arms = order.layers(name), order.suite.arms
    settings = _settings_of_user(order, name)
    start = find_config(last(layers, "config"), order.path)
    config = load_config(start, merged(layers, "settings") | settings, auto=False)
    usual = last(layers, "depths") or config.evaluation.depths
    depths = {arm: order.asked.depths or arms[arm].depths or usual for arm in order.arms}
    texts, refused = [], {}
    for arm in order.arms:
        own = map("=".join, _own_settings(order, arm, name).items())
        texts.append(" ".join([f"{arm}={words_of(arms[arm].text)[0]}", *own]))
        try:
            parse_arm(config, texts[-1])
        except UserError as error:
            refused[arm] = str(error).removeprefix(f"arm '{arm}': ")
            texts.pop()
    if not texts:
        return Entry(name, None, refused, depths)
    budget = order.suite.budget, order.asked.amount or last(layers, "amount")
    plan = make_plan(config, ",".join(texts), budget=budget, num_seeds=order.seeds, out=order.out / name,
                     depths=sorted(set().union(*depths.values())))
    notice_arms(plan.arms, settings)
    amounts = {name: round(plan.amount * arm.budget) for name, arm in arms.items()}
    planned = [replace(arm, config=arm.config.replace(**{"training.budget": amounts[arm.name]})) for arm in plan.arms]
    helpers = {helper: _helper_config(order, about, plan) for helper, about in order.scale.beforehand.items()}
    return Entry(name, replace(plan, arms=planned), refused, depths, helpers)


def _settings_of_user(order: Order, name: str) -> dict[str, str]:
    """The user's settings for an entry, without those that only other entries need. Raises UserError if a needed one
    is missing."""
    settings, needs = order.asked.settings, merged(order.layers(name), "needs")
    for setting, what in needs.items():
        if setting not in settings:
            out = f", or leave {name} out of --entries" if name else ""
            raise UserError(f"{name or order.path.stem} needs {what} at scale {order.asked.scale}; give --{setting}"
                            f"{out}")
    others = {setting for entry in order.suite.entries.values() for setting in entry.needs} - needs.keys()
    return {setting: value for setting, value in settings.items() if setting not in others}


def _helper_config(order: Order, helper: Helper, plan: Plan) -> Config:
    """The config of a helper, a run trained before the arms of a comparison and on the same data."""
    arms = plan.config.model_dump(mode="json")
    shared = {name: reduce(lambda part, key: part[key], name.split("."), arms) for name in helper.shares}
    budget = {} if helper.budget is None else {"training.budget": plan.amount * helper.budget}
    start = None if helper.config is None else find_config(helper.config, order.path)
    return load_config(start, shared | helper.settings | budget, auto=False)
