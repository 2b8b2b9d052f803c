"""The table of a comparison, a line an arm, with the sentences under it: what is in Markdown and in the page."""

import math
from collections.abc import Sequence
from dataclasses import replace

from looped.compare.plan import Plan
from looped.compare.summary import ArmSummary, Difference, Reach, Spread

TWIN = "ar"
UNITS = {"seconds": "seconds", "tokens": "tokens", "layer_forwards": "layer forwards"}


def table(arms: Sequence[ArmSummary], plan: Plan) -> tuple[list[str], list[list[str]]]:
    """(header, lines)."""
    header = ["arm", "next token", f"against {arms[0].name}", *(f"depth {depth}" for depth in plan.depths),
              "distinct-2", "seconds", "steps", "tokens", "layer forwards", "peak MB"]
    return header, [_line(arm, plan) for arm in arms]


def _line(arm: ArmSummary, plan: Plan) -> list[str]:
    c = arm.costs
    return [arm.name, _mean(arm.main), _difference(arm.difference),
            *(_mean(arm.by_depth.get(depth)) for depth in plan.depths),
            _mean(arm.over_seeds(lambda run: run.figure("distinct_2", run.place.text_depth))),
            f"{c['seconds'].mean:,.1f}", f"{c['step'].mean:,.0f}", f"{c['tokens'].mean:,.0f}",
            f"{c['layer_forwards'].mean:,.0f}", f"{c['peak_bytes'].mean / 1e6:,.0f}"]


def samples_table(arms: Sequence[ArmSummary]) -> tuple[list[str], list[list[str]]] | None:
    """(header, lines), a line an arm and depth, of samples beside the twin's at equal diversity; None if none were
    judged."""
    lines = [_samples_line(arm, depth) for arm in arms for depth in arm.judged_depths]
    header = ["arm", "depth", "distinct-2", f"against {TWIN}", "temperature", "distinct-2 there", "perplexity there",
              f"against {TWIN} there"]
    return (header, lines) if lines else None


def _samples_line(arm: ArmSummary, depth: int) -> list[str]:
    matched = replace(arm, runs=[run for run in arm.runs if run.figure("matched_nats", depth) is not None])
    return [arm.name, str(depth), _mean(arm.over_seeds(lambda run: run.figure("distinct_2", depth))),
            _percent(arm.behind("judged_behind_twin", depth)), *_matched_cells(matched, depth, len(arm.runs))]


def _matched_cells(arm: ArmSummary, depth: int, num_seeds: int) -> list[str]:
    """Of the seeds that could be brought to equal diversity, where not all of them could: how many."""
    if not arm.runs:
        return ["no match", "-", "-", "-"]
    temperature = arm.over_seeds(lambda run: run.figure("matched_nats", depth, "temperature"))
    seeds = "" if len(arm.runs) == num_seeds else f" ({len(arm.runs)} of {num_seeds} seeds)"
    perplexity = arm.over_seeds(lambda run: math.exp(run.figure("matched_nats", depth)))
    diversity = arm.over_seeds(lambda run: run.figure("matched_distinct_2", depth))
    return [f"{temperature.mean:.3f}{seeds}", _mean(diversity),
            f"{perplexity.mean:.1f}", _percent(arm.behind("matched_behind_twin", depth))]


def _percent(nats: tuple[float, float, float]) -> str:
    mean, low, high = (100 * math.expm1(value) for value in nats)
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _mean(value: Spread | None) -> str:
    """`3.616 ± 0.021`."""
    if value is None:
        return "-"
    return f"{value.mean:.3f}" + ("" if math.isnan(value.sd) else f" ± {value.sd:.3f}")


def _difference(value: Difference | None) -> str:
    return "-" if value is None else f"{value.mean:+.3f} [{value.ci_low:+.3f}, {value.ci_high:+.3f}]"


def notes(arms: Sequence[ArmSummary], plan: Plan) -> list[str]:
    """What the columns mean."""
    num, config = len(arms[0].runs[0].main), plan.config
    configs = [arm.runs[0].place.arm.config for arm in arms]
    means = " or ".join(map(str, sorted({config.recurrence.mean for config in configs})))
    found = [
        f"Held-out loss in nats a token (lower is better) of the same {num} sequences of {config.data.length} tokens, "
        + ("one seed." if plan.num_seeds == 1 else f"mean ± standard deviation over {plan.num_seeds} seeds."),
        f"next token: the one figure all arms have: a loop at its mean trained depth ({means}), ar at "
        f"its one step, a denoiser at sigma_max, where its input holds nothing of the answer and one pass predicts the "
        f"next token.",
        f"against {arms[0].name}: the difference of that figure, paired by sequence and seed; the 95 % interval is a "
        f"bootstrap over sequences of the mean over seeds, so it does not hold the spread between seeds.",
        "depth n: after n loop steps; for a denoiser the variational bound of its n-step stochastic solver.",
        f"distinct-2: the share of different pairs among all pairs of neighbouring tokens in the samples, at the mean "
        f"trained depth (a denoiser with {means} solver steps, ar with one).",
    ]
    blocks = {config.denoise.block_size for config in configs if config.objective == "denoise"} - {1}
    if blocks:
        sizes = " or ".join(map(str, sorted(blocks)))
        found.append(f"Where a denoiser writes blocks of {sizes} tokens, all tokens of a block are noisy together: at "
                     f"sigma_max each is predicted from the tokens before the block.")
    if samples_table(arms):
        found.append(f"perplexity: of the samples, as the {TWIN} run of the next seed reads them. A judge rewards "
                     f"repetition, so texts compare only where they are equally diverse: each arm writes again at the "
                     f"temperature at which its distinct-2 is that of the {TWIN} run of its seed ('there'; 'no "
                     f"match' where no temperature from 0.5 to 2 gives it, or the samples are too few). against "
                     f"{TWIN}: how much higher the perplexity is, in per cent, paired by prompt and seed, with a 95 % "
                     f"interval over prompts.")
    found.append("seconds, steps, tokens, layer forwards (a backward pass counts two), peak MB: of training alone, a "
                 "mean over seeds.")
    unfinished = [arm.name for arm in arms if len(arm.runs) < plan.num_seeds]
    if unfinished:
        found.append(f"Not all seeds are in: {', '.join(unfinished)}.")
    return found


def sentence(reach: Reach) -> str:
    """`denoise reaches truncated's final loss (3.616) after 0.14 of its own seconds: ...`."""
    start = f"{reach.arm} reaches {reach.to}'s final loss ({reach.loss:.3f})"
    if not reach.num_reached:
        return f"{reach.arm} does not reach {reach.to}'s final loss ({reach.loss:.3f})."
    seeds = "" if reach.num_reached == reach.num_seeds else f" in {reach.num_reached} of {reach.num_seeds} seeds"
    bound = "at most " if reach.early else ""
    shares = [f"{share:.2f} of {reach.to}'s {UNITS[unit]}" for unit, share in reach.shares.items()]
    return (f"{start}{seeds} after {bound}{reach.own:.2f} of its own seconds: {shares[0]}, {shares[1]} and "
            f"{shares[2]}.")
