"""The depth sweep: loss and samples of a trained model at every depth, as rows with intervals."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from looped.config import Config
from looped.data.eval_text import MeasuredText
from looped.data.token_numbers import tokenizer_of
from looped.devices import now
from looped.errors import UserError, did_you_mean
from looped.evaluation.intervals import Clusters, check_clusters, documents_of
from looped.evaluation.judge import judged_rows
from looped.evaluation.likelihood import DepthLosses, Documents, Likelihood
from looped.evaluation.mauve import mauve_rows
from looped.evaluation.metric_rows import Keep, Row, example_lines, keep_nothing, summarise
from looped.evaluation.options import Options
from looped.evaluation.sample_quality import diversity, matched_quality, write_texts
from looped.inference.cost import Cost
from looped.inference.rollout import at_once
from looped.inference.sequence_batch import Ending, Texts, as_lists, lengths_of
from looped.nn.checks import depths_of
from looped.objectives.base import Objective, require_objective
from looped.objectives.leaks import CacheUnread
from looped.tensor_types import Float, Int

NUM_LEVELS = 12
"""Noise levels at which a denoiser's loss is measured."""


@dataclass(frozen=True)
class DepthSweep:
    """`rows` to report; `per_example[metric][depth]`, one value per held-out sequence, for paired comparisons."""

    rows: list[Row]
    per_example: dict[str, dict[int, Float[Tensor, "num"]]]

    def means(self, metric: str) -> dict[int, float]:
        """Depth -> mean of a metric. Raises UserError for a metric that has no figures by depth."""
        known = {row.metric for row in self.rows if row.depth is not None}
        if metric not in known:
            raise UserError(f"unknown metric '{metric}' by depth{did_you_mean(metric, known)}")
        return {row.depth: row.mean for row in self.rows if row.metric == metric and row.depth is not None}


def evaluate_depth(objective: Objective, tokens: Documents, depths: Sequence[int], *, bytes_per_token: float,
                   lengths: Int[Tensor, "num"] | None = None, seed: int = 0, batch_size: int = 16,
                   num_trajectories: int = 0, num_levels: int = 32, clusters: Clusters | None = None,
                   keep: Keep = keep_nothing) -> DepthSweep:
    """Held-out nats/token and bits/byte at each of `depths`; for a denoiser also the loss by noise level.

    tokens: held-out sequences (N, L + 1), one token longer than the context, or a list of documents of any lengths;
    lengths: the real tokens of padded rows (`Likelihood`). Means are over tokens, so a long document counts more.
    bytes_per_token: converts nats/token to bits/byte.
    clusters: the document of each sequence, over which intervals are then; without it, sequences count as independent.
    For those of a run: `looped.documents_of(run.data.heldout.places(num, length))`.
    For a denoiser the loss is the variational bound (NELBO) of its stochastic solver; with `num_trajectories` its
    configured solver is sampled as well (`nats_by_solver`). For masked diffusion it is the bound of `depth` unmasking
    steps; the bound in the limit of infinitely many steps, over `num_levels` levels, is added (`nats_bound`,
    `bits_per_byte_bound`). `keep` receives each finished part. If some tokens are not scored (`Denoise.ask`), a warning
    reports their fraction, the nats/token cover the others, and there are no bits/byte.

    Raises UserError for an invalid objective, for ids outside its vocabulary, for depths below 1, and for clusters of
    another number of sequences.
    """
    require_objective(objective)
    if not bytes_per_token > 0:
        raise UserError(f"bytes_per_token {bytes_per_token} is not above 0; a run has it as run.data.bytes_per_token")
    depths, likelihood = depths_of(depths), Likelihood(
        objective, tokens, seed=seed, batch_size=batch_size, lengths=lengths)
    check_clusters(clusters, len(likelihood.tokens))
    rollout = likelihood.rollout
    rows, per_example, bits = [], {}, 1 / math.log(2) / bytes_per_token
    figure = partial(summarise, clusters=clusters)

    def took(part: list[Row], metric: str, losses: dict[int, Tensor], trajectories: int | None = None) -> None:
        rows.extend(part)
        per_example.setdefault(metric, {}).update(losses)
        keep(part, example_lines(metric, losses, trajectories=trajectories))

    def take(metric: str, measure: Callable[[Sequence[int]], list[DepthLosses]], cost_of: Callable[[int], Cost],
             trajectories: int | None = None) -> None:
        for group in at_once(objective, depths):
            part, results = [], measure(group)
            if results[0].share < 1:
                warnings.warn(f"{1 - results[0].share:.1%} of the held-out tokens are not scored: they begin a "
                              f"document inside a block of denoise.block_size; {metric} covers the others and is "
                              f"not comparable with another objective's", stacklevel=2)
            for result in results:
                cost = {"depth": result.depth, "seconds": result.seconds, "peak_bytes": peak_bytes(),
                        **cost_of(result.depth).fields(), "trajectories": trajectories}
                part.append(figure(metric, result.losses, **cost))
                if metric == "nats_per_token" and result.share == 1:  # else bits of only some tokens
                    part.append(figure("bits_per_byte", result.losses * bits, **cost))
            took(part, metric, {result.depth: result.losses for result in results}, trajectories)

    take("nats_per_token", likelihood.by_depth, rollout.likelihood_cost)
    if by_sigma := likelihood.by_level(NUM_LEVELS):
        sigma_max, at_max = by_sigma[0][0], by_sigma[0][1] + rollout.known_at_start
        took([*(figure("nats_at_sigma", losses, sigma=sigma) for sigma, losses in by_sigma),
              figure("nats_at_sigma_max", at_max, sigma=sigma_max)], "nats_at_sigma_max", {1: at_max})
    if num_trajectories and rollout.samples:
        take("nats_by_solver", lambda group: likelihood.by_solver(group, num_trajectories),
             lambda depth: rollout.sampled_cost(depth, num_trajectories), num_trajectories)
    if rollout.has_limit:
        whole = likelihood.limit(num_levels)
        took([figure("nats_bound", whole), figure("bits_per_byte_bound", whole * bits)], "nats_bound", {1: whole})
    return DepthSweep(rows, per_example)


@dataclass(frozen=True)
class Evaluation:
    """A sweep with its samples: `rows`, `per_example` as in `DepthSweep`, `samples` {depth, sequence, prompt, text};
    `documents`: of the sequences, if they are text."""

    rows: list[Row]
    per_example: dict[str, dict[int, Float[Tensor, "num"]]]
    samples: list[dict[str, Any]]
    documents: Clusters | None = None


def num_windows(data: MeasuredText, config: Config) -> int:
    """Number of held-out windows of an evaluation: enough for `evaluation.num_sequences` and for `.num_samples`, both
    of which take the first ones."""
    c = config.evaluation
    return min(max(c.num_sequences, c.num_samples), data.heldout.windows(config.data.length))


def evaluate_run(objective: Objective, data: MeasuredText, config: Config, depths: Sequence[int], options: Options, *,
                 keep: Keep = keep_nothing) -> Evaluation:
    """Everything `looped eval` reports on text: held-out text of `data`, with the sizes of `config.evaluation`.

    options.judge scores the samples and, as a reference, the held-out text after their prompts; with options.match it
    also compares them with a baseline's samples at equal diversity. options.mauve is the encoder of MAUVE. `keep`
    receives each finished part.
    """
    judge, match, encoder = options.judge, options.match, options.mauve
    c, device = config.evaluation, next(objective.parameters()).device
    tokens = data.heldout.sequences(num_windows(data, config), config.data.length).to(device)
    prompts = tokens[: c.num_samples, : c.prompt_length]
    truth = tokens[: c.num_samples, c.prompt_length : c.prompt_length + c.sample_length]
    if encoder is not None and truth.shape[1] < c.sample_length:
        raise UserError(f"evaluation.sample_length {c.sample_length} is longer than the held-out text after a prompt, "
                        f"so MAUVE would compare lengths; try {truth.shape[1]}")
    truth = Ending(objective.end_of_text).cut(truth)
    documents = documents_of(data.heldout.places(len(tokens), config.data.length))[: c.num_sequences]
    sweep = evaluate_depth(objective, tokens[: c.num_sequences], depths, bytes_per_token=data.bytes_per_token,
                           seed=config.seed, batch_size=c.batch_size, num_trajectories=options.trajectories,
                           num_levels=c.levels, clusters=documents, keep=keep)
    rows, per_example, samples, texts = sweep.rows, sweep.per_example, [], {}
    decode = tokenizer_of(data).decode

    def took(part: list[Row], examples: Sequence[dict] = (), written: Sequence[dict] = ()) -> None:
        rows.extend(part)
        samples.extend(written)
        keep(part, examples, written)

    for depth in depths:
        part, found = evaluate_samples(objective, prompts, [depth], num_tokens=c.sample_length, seed=config.seed)
        texts |= found
        took(part, written=[{"depth": depth, "sequence": number, "prompt": decode(prompt), "text": decode(text)}
                            for depth, written in found.items() for number, (prompt, text) in enumerate(
                                zip(prompts.tolist(), as_lists(written), strict=True))])
    if judge is not None:
        took(judged_rows(judge, prompts, truth, decode, suffix="_of_text"))
        for depth in texts:
            took(judged_rows(judge, prompts, texts[depth], decode, depth=depth))
    if judge is not None and match is not None and texts:
        found = matched_quality(objective, match, judge, prompts, texts,
                                {"num_tokens": c.sample_length, "seed": config.seed})
        per_example = per_example | found.per_example
        took(found.rows, [line for metric, by_depth in found.per_example.items()
                          for line in example_lines(metric, by_depth, by=judge.name, twin=match.name)])
    if encoder is not None and texts:
        real, *written = ([decode(row) for row in as_lists(torch.cat([prompts, each], dim=1))]
                          for each in (truth, *texts.values()))
        took(mauve_rows(encoder, real, dict(zip(texts, written, strict=True)), seed=config.seed))
    return Evaluation(rows, per_example, samples, documents)


def evaluate_samples(objective: Objective, prompts: Int[Tensor, "num length"], depths: Sequence[int], *,
                     num_tokens: int, seed: int = 0) -> tuple[list[Row], dict[int, Texts]]:
    """Continuations of held-out prompts at each depth, with rows on their diversity, length and speed (tokens/s); of a
    model that cannot write, nothing but a notice."""
    samples, rows = {}, []
    for depth in depths:
        start = now(prompts.device)
        try:
            samples[depth] = write_texts(objective, prompts, depth, num_tokens=num_tokens, seed=seed)
        except CacheUnread as reason:
            warnings.warn(f"no samples: {reason}", stacklevel=2)
            break
        seconds = now(prompts.device) - start
        rows += [*diversity(samples[depth], depth),
                 summarise("text_tokens", lengths_of(samples[depth]).cpu().double(), depth=depth),
                 Row("tokens_per_second", int(lengths_of(samples[depth]).sum()) / seconds, None, None, len(prompts),
                     depth=depth, seconds=seconds)]
    return rows, samples


def peak_bytes() -> int:
    """Peak memory so far: of the CUDA allocator if CUDA is in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", 0) or _peak_rss() or info.rss)


def _peak_rss() -> int:
    """Peak resident bytes on POSIX; 0 if the resource module is missing."""
    try:
        import resource
    except ImportError:
        return 0
    import sys

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
