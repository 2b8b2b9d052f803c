"""Seconds, bytes and layer forwards of an optimiser step, for several arms side by side."""

from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

from looped.config import Config
from looped.config.arms import ARMS, read_arms
from looped.cost.arm_timing import NUM_WARMUP, Arm
from looped.devices import machine, machine_line
from looped.errors import UserError


def bench_step(config: Config, objectives: Sequence[str], *, repeats: int = 5, threads: int = 1) -> dict[str, Any]:
    """Seconds, saved bytes, peak memory and layer forwards per optimiser step of each arm, and their ratios.

    A step is the trainer's, on the first batch of the config (for text, as many random tokens): forward and backward
    over the micro-batches, clip, AdamW, zero_grad. Sampled depth is replaced by its mean (`at_mean_depth`), because the
    time of a step is linear in both of its depths and a few draws from so wide a distribution would measure the draws.
    This ignores that the deepest sequences finish in a smaller batch under `recurrence.per_sequence`.

    `objectives`: arms as `looped.config.arms` reads them. Returns {"arms": {name: ...}, "ratios": {"first/second":
    ...}, "machine": ...}; seconds are medians, given with minimum and maximum, and cpu_seconds exclude the time a
    process waited for the CPU on a shared machine.
    Raises `UserError` for an unknown name or an arm whose process ends early.
    """
    configs = {arm.name: at_mean_depth(arm.config) for arm in read_arms(config, objectives)}
    if not configs:
        raise UserError(f"bench step needs at least one objective; known names: {', '.join(ARMS)}")
    with ExitStack() as stack:
        arms = {name: stack.enter_context(Arm(name, arm, threads)) for name, arm in configs.items()}
        for _ in range(NUM_WARMUP):
            for arm in arms.values():
                arm.ask("step")
        rounds = [{name: arm.ask("step") for name, arm in arms.items()} for _ in range(repeats)]
        figures = {name: _summary([steps[name] for steps in rounds]) | arm.ask("figures")
                   for name, arm in arms.items()}
    return {"arms": figures, "ratios": _ratios(figures, rounds), "machine": machine(threads)}


def at_mean_depth(config: Config) -> Config:
    """Config with every step at the mean depth: mean + 1 under Huginn's sampler, the last `backprop` with gradient."""
    return config.replace(**config.rule.as_deep_as_mean(config))


def _summary(steps: list[dict]) -> dict[str, Any]:
    seconds = [step["seconds"] for step in steps]
    return {"step_seconds": median(seconds), "step_seconds_min": min(seconds), "step_seconds_max": max(seconds),
            "step_cpu_seconds": median(step["cpu_seconds"] for step in steps)}


def _ratios(figures: dict[str, dict], rounds: list[dict[str, dict]]) -> dict[str, Any]:
    """Cost of each earlier arm divided by that of each later one; minimum and maximum time are over single rounds."""
    names, ratios = list(figures), {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = figures[first], figures[second]
            paired = [steps[first]["seconds"] / steps[second]["seconds"] for steps in rounds]
            keys = ("step_seconds", "step_cpu_seconds", "saved_activation_bytes", "peak_rss_bytes", "layer_forwards",
                    "step_flops")
            ratios[f"{first}/{second}"] = {key: a[key] / b[key] for key in keys} | {
                "step_seconds_min": min(paired), "step_seconds_max": max(paired)}
    return ratios


def format_step(result: dict[str, Any]) -> str:
    """The table of `bench_step`."""
    heads = "s/step", "min - max", "kept, MB", "peak, MB", "layer fwd"
    lines = [f"{'objective':16} {heads[0]:>9} {heads[1]:>17} {heads[2]:>10} {heads[3]:>10} {heads[4]:>10}"]
    for name, a in result["arms"].items():
        spread = f"{a['step_seconds_min']:.3f} - {a['step_seconds_max']:.3f}"
        lines.append(f"{name:16} {a['step_seconds']:9.3f} {spread:>17} {a['saved_activation_bytes'] / 1e6:10.1f} "
                     f"{a['peak_rss_bytes'] / 1e6:10.0f} {a['layer_forwards']:10.0f}")
    for name, r in result["ratios"].items():
        lines.append(f"{name}: {r['step_seconds']:.2f} x the time ({r['step_seconds_min']:.2f} - "
                     f"{r['step_seconds_max']:.2f} per round; {r['step_cpu_seconds']:.2f} x the CPU time), "
                     f"{r['saved_activation_bytes']:.2f} x the bytes kept, "
                     f"{r['layer_forwards']:.2f} x the layer forwards")
    return "\n".join([*lines, machine_line(result["machine"])])
