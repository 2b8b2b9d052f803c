"""Tables of a comparison on text, one line per arm, with the notes below them, and samples."""

import math
from collections.abc import Sequence
from dataclasses import replace

from looped.compare.plan import Plan
from looped.compare.table_cells import closing_notes, cost_cells, difference_cell, mean_cell, over_seeds
from looped.compare.text_summary import TextSummary
from looped.config.unread_settings import not_read_under
from looped.reports.sections import Folded, Heading, Section, Table, Verbatim

TWIN = "ar"
NUM_SAMPLES = 3
"""Sample texts per arm in the report."""


def text_table(arms: Sequence[TextSummary], plan: Plan) -> Table:
    """Losses, then the costs."""
    header = ["arm", "next token", f"against {arms[0].name}", *(f"depth {depth}" for depth in plan.depths),
              "distinct-2", "seconds", "steps", "tokens", "layer forwards", "peak MB"]
    return Table(header, [_line(arm, plan) for arm in arms])


def _line(arm: TextSummary, plan: Plan) -> list[str]:
    return [arm.name, mean_cell(arm.main), difference_cell(arm.difference),
            *(mean_cell(arm.by_depth.get(depth)) for depth in plan.depths),
            mean_cell(arm.over_seeds(lambda run: run.figure("distinct_2", run.place.text_depth))),
            *cost_cells(arm).values()]


def samples_table(arms: Sequence[TextSummary]) -> Table:
    """Samples compared with the ar baseline's at equal diversity: one line per arm and depth, none if none were judged.
    """
    lines = [_samples_line(arm, depth) for arm in arms for depth in arm.judged_depths]
    header = ["arm", "depth", "distinct-2", f"against {TWIN}", "temperature", "distinct-2 there", "perplexity there",
              f"against {TWIN} there"]
    return Table(header, lines)


def _samples_line(arm: TextSummary, depth: int) -> list[str]:
    matched = replace(arm, runs=[run for run in arm.runs if run.figure("matched_nats", depth) is not None])
    return [arm.name, str(depth), mean_cell(arm.over_seeds(lambda run: run.figure("distinct_2", depth))),
            _percent(arm.behind("judged_behind_twin", depth)), *_matched_cells(matched, depth, len(arm.runs))]


def _matched_cells(arm: TextSummary, depth: int, num_seeds: int) -> list[str]:
    """Cells for the seeds that could be brought to equal diversity, with their number if not all could."""
    if not arm.runs:
        return ["no match", "-", "-", "-"]
    temperature = arm.over_seeds(lambda run: run.figure("matched_nats", depth, "temperature"))
    seeds = "" if len(arm.runs) == num_seeds else f" ({len(arm.runs)} of {num_seeds} seeds)"
    perplexity = arm.over_seeds(lambda run: math.exp(run.figure("matched_nats", depth)))
    diversity = arm.over_seeds(lambda run: run.figure("matched_distinct_2", depth))
    return [f"{temperature.mean:.3f}{seeds}", mean_cell(diversity),
            f"{perplexity.mean:.1f}", _percent(arm.behind("matched_behind_twin", depth))]


def _percent(nats: tuple[float, float, float]) -> str:
    mean, low, high = (100 * math.expm1(value) for value in nats)
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"


def text_notes(arms: Sequence[TextSummary], plan: Plan) -> list[str]:
    """Notes that explain the columns."""
    first, config = arms[0].runs[0], plan.config
    taken = ", which are taken as independent," if first.clusters is not None and not first.clusters.suffice else ""
    configs = [arm.runs[0].place.arm.config for arm in arms]
    means = " or ".join(map(str, sorted({config.recurrence.mean for config in configs})))
    found = [
        f"Held-out loss in nats/token (lower is better) of the same {first.examples}, of "
        f"{config.data.length} tokens each, {over_seeds(plan)}.",
        f"next token: the metric that all arms share: a loop at recurrence.mean ({means}), ar with its single step, a "
        f"denoiser in one pass at sigma_max, with the nats that its noisy input can still say of the target "
        f"there added, |y|^2 / (2 sigma_max^2). Masked diffusion has no next-token prediction; its bound over all "
        f"tokens is given instead.",
        f"against {arms[0].name}: the difference in that metric, paired by sequence and seed; the 95 % interval is a "
        f"bootstrap over {first.units}{taken} of the mean over seeds, so it does not include the spread between seeds.",
        "depth n: after n loop steps; for a denoiser the variational bound of its n-step stochastic solver, for masked "
        "diffusion the bound of n unmasking steps.",
        f"distinct-2: the fraction of distinct bigrams among all token bigrams of the samples, at recurrence.mean "
        f"({means}; a denoiser with as many solver steps, ar with one step).",
    ]
    blocks = {config.denoise.block_size for config in configs
              if not not_read_under(config, "denoise.block_size")} - {1}
    if blocks:
        sizes = " or ".join(map(str, sorted(blocks)))
        found.append(f"If a denoiser generates blocks of {sizes} tokens, all tokens of a block are noisy together: at "
                     f"sigma_max each is predicted from the tokens before the block.")
    if any(arm.judged_depths for arm in arms):
        found.append(f"perplexity: of the samples, under the {TWIN} run of the next seed (the judge). A judge rewards "
                     f"repetition, so texts are comparable only at equal diversity: each arm is sampled again at the "
                     f"temperature at which its distinct-2 equals that of the {TWIN} run of the same seed ('there'; "
                     f"'no match' if no temperature from 0.5 to 2 does, or if there are too few samples). against "
                     f"{TWIN}: the relative increase in perplexity in per cent, paired by prompt and seed, with a 95 % "
                     f"interval over prompts.")
    return found + closing_notes(arms, plan)


def text_samples(arms: Sequence[TextSummary]) -> list[Section]:
    """The table of samples at equal diversity, and a few samples of each arm's first run, at the arm's `text_depth`."""
    return [Heading("Samples at equal diversity"), samples_table(arms),
            Heading("Samples"), *(_texts(arm, opened=not i) for i, arm in enumerate(arms))]


def _texts(arm: TextSummary, *, opened: bool) -> Section:
    run, depth = arm.runs[0], arm.runs[0].place.text_depth
    texts = [Verbatim(each["text"], each["prompt"]) for each in run.samples if each["depth"] == depth][:NUM_SAMPLES]
    return Folded(f"{arm.name}, seed {run.place.seed}, depth {depth}", texts, opened)
