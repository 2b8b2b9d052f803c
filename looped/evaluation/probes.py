"""Sanity checks of a trained model (`--probes`): rows of figures, and one sentence for each check that fails.

The failures they detect, all of which have occurred: a denoiser that copies instead of predicting, because the answer
is readable in z at most of its training levels; a model that reads the tokens after the one it is to predict; a model
that ignores its context; quality that falls with depth; a state that grows with depth.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from looped.diffusion.clean_estimate import bridge
from looped.diffusion.denoiser import levels_of
from looped.evaluation.depth_verdicts import NATS, verdict
from looped.evaluation.intervals import Clusters, confidence_interval
from looped.evaluation.likelihood import next_token_losses
from looped.evaluation.metric_rows import Row, summarise
from looped.evaluation.sample_quality import Reference
from looped.evaluation.state_stats import StateStats, growth
from looped.inference.rollout import rollout_of
from looped.objectives.base import Objective, evaluating, rows_of_batch, token_losses
from looped.objectives.denoise import Denoise
from looped.rng import StepRandom, generator
from looped.tensor_types import Float, Int

NUM_LEVELS = 8
READING_GAP = 0.05
"""Nats/token that knowing the rest of a block must save; below it, the rows of a block do not use each other."""
SCRAMBLED_GAP = 0.3
"""Nats/token that another sequence's context must cost; below it, the context counts as ignored."""
CHANCE_GAP = 0.5
"""Nats/token below ln V that the first step must reach; else it counts as chance. A probe fails only if the whole 95 %
interval is beyond its limit."""

LATER_GAP = 0.01
"""Nats/token that later tokens may change, for rounding."""
NUM_CHANGED = 4
"""Sequences whose later tokens are changed."""

Tokens = Int[Tensor, "num length_and_one"]


@dataclass(frozen=True)
class Probes:
    """`rows` of figures, and one of `sentences` per failure."""

    rows: list[Row]
    sentences: list[str]


@torch.no_grad()
def probe(objective: Objective, tokens: Tokens, by_depth: Mapping[int, Float[Tensor, "num"]], *, vocab_size: int,
          twin: Reference | None = None, seed: int = 0, clusters: Clusters | None = None) -> Probes:
    """All probes that apply to the objective, on held-out sequences.

    by_depth: nats/token of every sequence at each depth (`DepthSweep.per_example`). twin: the autoregressive baseline,
    at its own depth.
    clusters: the document of each sequence.
    """
    with evaluating(objective):
        return _probe(objective, tokens, by_depth, vocab_size, twin, seed, clusters)


def _probe(objective: Objective, tokens: Tokens, by_depth: Mapping[int, Float[Tensor, "num"]], vocab_size: int,
           twin: Reference | None, seed: int, clusters: Clusters | None) -> Probes:
    mean = objective.ask(tokens).mean
    first = mean(next_token_losses(objective, tokens, min(by_depth), seed=seed)).cpu().double()
    rows = [Row("ln_vocabulary", math.log(vocab_size), math.log(vocab_size), math.log(vocab_size), 1)]
    sentences = [depth_verdict(by_depth, clusters), _against_chance(first, vocab_size, clusters)]
    sentences = [said for said in sentences if said]
    scrambled = scrambled_context(objective, tokens, seed=seed)
    rows.append(summarise("scrambled_context_costs", scrambled, clusters=clusters))
    if confidence_interval(scrambled, clusters)[1] < SCRAMBLED_GAP:
        sentences.append(f"it ignores its context: another sequence's context costs {scrambled.mean():.2f} nats/token, "
                         f"less than the {SCRAMBLED_GAP} expected")
    rows += (later := later_tokens(objective, tokens, max(by_depth), seed=seed))
    if any(row.mean > LATER_GAP for row in later):
        sentences.append(f"it reads later tokens: other tokens there change the losses before them by up to "
                         f"{later[0].mean:.2f} nats/token, so its likelihoods are wrong; see what in its core or rule "
                         f"ignores the attention mask")
    if twin is not None:
        behind = first - next_token_losses(twin.objective, tokens, twin.depth, seed=seed).mean(1).cpu().double()
        rows.append(summarise("behind_the_twin", behind, clusters=clusters))
    found = PROBES.get(rollout_of(objective).name, _of_others)(objective, tokens, max(by_depth), seed, clusters)
    rows, sentences = rows + found.rows, sentences + found.sentences
    if grows := growth({row.depth: row.mean for row in rows if row.metric == "state_rms"}):
        sentences.append(f"{grows}, which the norm layers hide from the loss; model.block sandwich, or model.injection "
                         f"linear, gated or diagonal would keep its size")
    return Probes(rows, sentences)


def depth_verdict(by_depth: Mapping[int, Float[Tensor, "num"]], clusters: Clusters | None = None) -> str:
    """Sentence of the verdict if quality falls after the best depth, else ""."""
    found = verdict(by_depth, NATS, clusters=clusters)
    return found.sentence if found.name in ("drifts", "overthinks") else ""


def _against_chance(losses: Float[Tensor, "num"], vocab_size: int, clusters: Clusters | None = None) -> str:
    if confidence_interval(losses, clusters)[0] < math.log(vocab_size) - CHANCE_GAP:
        return ""
    return (f"it predicts no better than chance before it sees the answer: {losses.mean():.2f} nats/token at its first "
            f"step, ln V is {math.log(vocab_size):.2f}; a denoiser with this and a low mean loss only copies")


def scrambled_context(objective: Objective, tokens: Tokens, *, seed: int = 0) -> Float[Tensor, "num"]:
    """Nats/token that the context of another sequence costs, at one loop step or at sigma_max."""
    batch = objective.ask(tokens)
    y, random = batch.targets, StepRandom(seed, 0, count=len(tokens), device=tokens.device)

    def losses(context: Tensor) -> Tensor:
        return token_losses(rollout_of(objective).first_logits(replace(batch, inputs=context), random), y)

    return batch.mean(losses(batch.inputs.roll(1, 0)) - losses(batch.inputs)).cpu().double()


def later_tokens(objective: Objective, tokens: Tokens, depth: int, *, seed: int = 0) -> list[Row]:
    """The largest change of a loss at a depth, in nats/token, if all tokens that come after it are others; no row for
    sequences that are one block of tokens."""
    together, tokens = rollout_of(objective).tokens_at_once, tokens[:NUM_CHANGED]
    first = (tokens.shape[1] - 1) // 2 // together * together  # the first target that is changed is that of this row
    if not first:
        return []
    others = torch.cat([tokens[:, : first + 1], (tokens[:, first + 1 :] + 1) % objective.model.vocab_size], dim=1)
    before, after = (next_token_losses(objective, rows, depth, seed=seed)[:, :first] for rows in (tokens, others))
    change = (after - before).abs().max().item()
    return [Row("later_tokens_change", change, change, change, len(tokens), depth=depth)]


def _noised(objective: Denoise, y: Tensor, level: float, random: StepRandom) -> tuple[Tensor, Tensor]:
    target = objective.denoiser.target(y)
    z = target + level * random.normal("noise", target.shape[1:])
    return z, torch.full((len(y),), level, dtype=torch.float64)


def block_reading(objective: Denoise, tokens: Tokens, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Nats/token of every sequence at sigma_max: (with its whole block at sigma_max, with the others of its block at
    sigma_min, which all but reveals them). The second is measured position by position and averaged."""
    batch, noise, block = objective.ask(tokens), objective.noise, objective.config.block_size
    y = batch.targets
    random = StepRandom(seed, 0, count=len(tokens), device=tokens.device)
    target = objective.denoiser.target(y)
    eps, place = random.normal("noise", target.shape[1:]), torch.arange(y.shape[1], device=y.device) % block

    def losses(levels: Tensor) -> Tensor:
        z = target + levels.float().to(eps.device).unsqueeze(-1) * eps
        return token_losses(objective.logits(batch, z, levels_of(z, levels)), y)

    alone = losses(torch.full(y.shape[1:], noise.sigma_max, dtype=torch.float64))
    known = torch.zeros_like(alone)
    for row in range(block):
        sought = place == row
        levels = torch.full(sought.shape, noise.sigma_min, dtype=torch.float64)
        known += losses(levels.masked_fill(sought.cpu(), noise.sigma_max)) * sought
    return batch.mean(alone).cpu().double(), batch.mean(known).cpu().double()


def denoiser_probes(objective: Denoise, tokens: Tokens, *, seed: int = 0,
                    clusters: Clusters | None = None) -> list[Row]:
    """By noise level: entropy of the readout (nats) and norm of the soft estimate relative to |y|; decodability."""
    batch, random = objective.ask(tokens), StepRandom(seed, 0, count=len(tokens), device=tokens.device)
    y = batch.targets
    table, norm, rows = objective.denoiser.table(), objective.denoiser.targets.row_norm, []
    for level in _levels(objective):
        logits = objective.logits(batch, *_noised(objective, y, level, random))
        log_p = torch.log_softmax(logits, -1)
        entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1)
        length = bridge("soft", logits, table).norm(dim=-1) / norm
        rows += [summarise(name, each.mean(1).cpu().double(), sigma=level, clusters=clusters)
                 for name, each in (("readout_entropy", entropy), ("bridge_norm", length))]
    sigma, share = decodability(table, objective, y)
    return [*rows, Row("decodable_below_sigma", sigma, sigma, sigma, y.numel()),
            Row("training_mass_decodable", share, share, share, y.numel())]


def _levels(objective: Denoise) -> list[float]:
    noise = objective.noise
    return torch.logspace(noise.x_max, noise.x_min, NUM_LEVELS, base=torch.e, dtype=torch.float64).tolist()


def decodability(table: Float[Tensor, "vocab dim"], objective: Denoise,
                 y: Int[Tensor, "num length"]) -> tuple[float, float]:
    """(`sigma*`, fraction of the training mass below it). Below `sigma*` the table's row nearest to z is the answer
    more often than not, for any network. Bisection in ln sigma between 1/100 and 100 times the norm of a row."""
    picks = torch.randperm(y.numel(), generator=generator("decodability"))[:2000].to(y.device)
    answers = y.flatten()[picks]
    eps = torch.randn(len(answers), table.shape[1], generator=generator("decodability noise")).to(y.device)
    norm = objective.denoiser.targets.row_norm
    low, high = math.log(norm / 100), math.log(norm * 100)
    for _ in range(30):
        middle = (low + high) / 2
        z = table[answers] + math.exp(middle) * eps
        hits = ((z @ table.T).argmax(-1) == answers).float().mean()  # rows share one norm: nearest is largest product
        low, high = (middle, high) if hits > 0.5 else (low, middle)
    sigma = math.exp(low)
    return sigma, float(objective.noise.cdf(torch.tensor(sigma, dtype=torch.float64)))


def loop_probes(objective: Objective, tokens: Tokens, num_steps: int, *, seed: int = 0,
                clusters: Clusters | None = None) -> list[Row]:
    """By loop step: root mean square of the state, and contraction, |s_t - s_{t-1}| over |s_{t-1} - s_{t-2}|."""
    model, random = objective.model, StepRandom(seed, 0, count=len(tokens), device=tokens.device)
    batch = objective.ask(tokens)
    told = rows_of_batch(batch)
    e = model.encode(batch.inputs, told)
    noise = random.normal("state", e.shape[1:]) if model.recurrence.needs_noise else None
    motion = StateStats()
    model.unroll(e, told, grad=num_steps, noise=noise, callback=lambda _, state: motion.take(state),
                 damping=objective.damping)
    rows = []
    for depth, (size, ratio) in enumerate(zip(motion.sizes, motion.ratios, strict=True), start=1):
        rows.append(summarise("state_rms", size, depth=depth, clusters=clusters))
        if ratio is not None:
            rows.append(summarise("contraction", ratio, depth=depth, clusters=clusters))
    return rows


def _of_denoiser(objective: Denoise, tokens: Tokens, depth: int, seed: int, clusters: Clusters | None) -> Probes:
    rows, sentences = [], []
    # With several core blocks, no single block owns rows of several noise levels.
    if objective.config.block_size > 1 and objective.denoiser.edges is None:
        alone, known = block_reading(objective, tokens, seed=seed)
        rows += [summarise("block_alone", alone, clusters=clusters),
                 summarise("block_others_known", known, clusters=clusters)]
        if confidence_interval(alone - known, clusters)[1] < READING_GAP:
            sentences.append(f"the tokens of a block do not use each other: knowing the others saves "
                             f"{(alone - known).mean():.2f} nats/token, so more solver steps cannot help")
    return Probes(rows + denoiser_probes(objective, tokens, seed=seed, clusters=clusters), sentences)


def _of_loop(objective: Objective, tokens: Tokens, depth: int, seed: int, clusters: Clusters | None) -> Probes:
    return Probes(loop_probes(objective, tokens, depth, seed=seed, clusters=clusters), [])


def _of_others(objective: Objective, tokens: Tokens, depth: int, seed: int, clusters: Clusters | None) -> Probes:
    return Probes([], [])


PROBES: dict[str, Callable[[Objective, Tokens, int, int, Clusters | None], Probes]]
PROBES = {"solver": _of_denoiser, "loop": _of_loop}
"""Name of a rollout -> the probes specific to it."""


def probe_table(rows: Sequence[Row]) -> str:
    """One line per row of the probes."""
    lines = []
    for row in rows:
        place = f" at sigma {row.sigma:.2f}" if row.sigma is not None else f" at depth {row.depth}" if row.depth else ""
        shown = f"{row.mean:.3f}" if row.ci_low == row.ci_high else row.shown()
        lines.append(f"  {row.metric.replace('_', ' ')}{place}: {shown}")
    return "\n".join(lines)
