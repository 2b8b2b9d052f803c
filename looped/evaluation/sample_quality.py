"""Sample quality: diversity, and a judge's loss compared with that on a baseline's samples of equal diversity.

Text restricted to likely tokens has a low loss under any judge, and so has repetition. So the judged losses of two
models are comparable only at equal diversity: `matched_quality` samples again at the temperature at which pooled
distinct-2 equals the baseline's.

distinct-n: Li et al. 2016 (arXiv 1510.03055), pooled over texts. seq-rep-n: Welleck et al. 2020 (arXiv 1908.04319).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from looped.errors import UserError
from looped.evaluation.judge import Reader
from looped.evaluation.metric_rows import Row, summarise
from looped.inference.generate import generate
from looped.inference.sequence_batch import Texts, as_lists
from looped.objectives.base import Objective
from looped.tensor_types import Float, Int

BATCH = 128
"""Texts per batch; the texts do not depend on it."""
TEMPERATURES = 0.5, 2.0
"""Range in which a matching temperature is searched."""
TOLERANCE = 0.005
"""Largest difference of two distinct-2 that count as equal; a unit of it may be worth several judged nats/token."""


def write_texts(objective: Objective, prompts: Int[Tensor, "num length"], depth: int, *, num_tokens: int,
                temperature: float = 1.0, seed: int = 0) -> Texts:
    """One continuation per prompt at one depth, for any number of prompts."""
    return torch.cat([generate(objective, prompts[start : start + BATCH], num_tokens=num_tokens, depth=depth,
                               temperature=temperature, seed=seed, first_row=start)
                      for start in range(0, len(prompts), BATCH)])


# ----------------------------------------------------------------------------- diversity


def diversity(texts: Texts, depth: int | None = None) -> list[Row]:
    """distinct-1, 2 and 4 and repetition-4 of a set of texts."""
    lists, rows = as_lists(texts), []
    for n in (1, 2, 4):
        mean, spread = distinct(lists, n), jackknife(lists, n)
        rows.append(Row(f"distinct_{n}", mean, mean - spread, mean + spread, len(lists), depth=depth))
    return [*rows, summarise("repetition_4", repetition(lists, 4), depth=depth)]


def distinct(texts: Sequence[Sequence[Any]], n: int) -> float:
    """Fraction of distinct n-grams among all n-grams of all texts (end of text is a token); 0 if there are none. It
    falls as texts are added, so compare only equal numbers of texts, of nearly equal lengths."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[Sequence[Any]], n: int) -> Float[Tensor, "num"]:
    """seq-rep-n of each text: the fraction of its n-grams that occurred earlier in it; 0 if there are none."""
    return torch.tensor([1 - distinct([text], n) if len(text) >= n else 0.0 for text in texts], dtype=torch.float64)


def leave_one_out(texts: Sequence[Sequence[Any]], n: int) -> Float[Tensor, "num"]:
    """distinct-n of all texts but the i-th, for each i."""
    grams = [_ngrams(text, n) for text in texts]
    holders = Counter(gram for each in grams for gram in set(each))
    total = sum(map(len, grams))
    own = [sum(holders[gram] == 1 for gram in set(each)) for each in grams]
    return torch.tensor([(len(holders) - alone) / max(1, total - len(each))
                         for alone, each in zip(own, grams, strict=True)], dtype=torch.float64)


def jackknife(texts: Sequence[Sequence[Any]], n: int) -> float:
    """Half-width of the 95 % interval of distinct-n, by jackknife over texts: a bootstrap repeats texts, which lowers
    distinct-n."""
    if len(texts) < 2:
        return math.nan
    return 1.96 * math.sqrt((len(texts) - 1) * leave_one_out(texts, n).var(correction=0).item())


def _ngrams(text: Sequence, n: int) -> list[tuple]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


# ----------------------------------------------------------------------------- matched diversity


@dataclass(frozen=True)
class Matched:
    """Texts at the temperature whose diversity is nearest to the target; `reached`: within the tolerance."""

    temperature: float
    texts: Texts
    distinct: float
    reached: bool


def match_distinct(write: Callable[..., Texts], reference: float, *, start: Texts | None = None,
                   tolerance: float = TOLERANCE, temperatures: tuple[float, float] = TEMPERATURES,
                   max_tries: int = 12) -> Matched:
    """Texts of `write(temperature=...)` whose pooled distinct-2 equals `reference` within the tolerance.

    A secant search from temperature 1, within the bracket found so far. If `write` draws the same random numbers at
    every temperature, diversity is smooth in it. If no temperature of the range reaches the reference, `reached` is
    False and the texts are the nearest ones. start: the texts of temperature 1, if already written.
    """
    gaps: dict[float, float] = {}
    best, temperature = None, 1.0
    while temperature not in gaps and len(gaps) < max_tries:
        texts = start if temperature == 1.0 and start is not None else write(temperature=temperature)
        share = distinct(as_lists(texts), 2)
        gaps[temperature] = share - reference
        if best is None or abs(share - reference) < abs(best.distinct - reference):
            best = Matched(temperature, texts, share, abs(share - reference) <= tolerance)
        if best.reached:
            break
        temperature = _next_temperature(gaps, *temperatures)
    return best


def _next_temperature(gaps: dict[float, float], lowest: float, highest: float) -> float:
    """Next temperature to try, from the gaps in diversity at those tried so far."""
    pairs = [(under, over) for under in gaps if gaps[under] < 0 for over in gaps if gaps[over] > 0]
    if pairs:  # the narrowest bracket: diversity jumps a little with any change of temperature
        under, over = min(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        share = gaps[under] / (gaps[under] - gaps[over])
        return under + min(max(share, 0.1), 0.9) * (over - under)  # away from the ends, where a try is not informative
    near = sorted(gaps, key=lambda temperature: abs(gaps[temperature]))
    slope = 0.3  # for the first step; later ones use the measured slope
    if len(near) > 1 and (gaps[near[1]] - gaps[near[0]]) * (near[1] - near[0]) > 0:
        slope = (gaps[near[1]] - gaps[near[0]]) / (near[1] - near[0])
    step = 1.2 * gaps[near[0]] / slope  # a little too far, to bracket the reference
    return min(max(near[0] - step, lowest), highest)


@dataclass(frozen=True)
class Quality:
    """`rows` to report; `per_example[metric][depth]`, one value per prompt, for comparisons over seeds."""

    rows: list[Row] = field(default_factory=list)
    per_example: dict[str, dict[int, Float[Tensor, "num"]]] = field(default_factory=dict)

    def take(self, metric: str, values: Float[Tensor, "num"], fields: Mapping[str, Any]) -> None:
        self.rows.append(summarise(metric, values, **fields))
        self.per_example.setdefault(metric, {})[fields["depth"]] = values

    def take_behind(self, kind: str, differences: Float[Tensor, "num"], fields: Mapping[str, Any]) -> None:
        """Add paired differences in nats/token, and the excess perplexity in per cent that they amount to."""
        self.take(f"{kind}_behind_twin", differences, fields)
        row = self.rows[-1]
        self.rows.append(Row(f"{kind}_perplexity_percent", *(
            nats if nats is None else 100 * math.expm1(nats) for nats in (row.mean, row.ci_low, row.ci_high)), row.n,
                             **fields))


@dataclass(frozen=True)
class Reference:
    """Baseline whose sample diversity is matched: a model with the same tokenizer, at its own depth."""

    name: str
    objective: Objective
    depth: int


def matched_quality(objective: Objective, twin: Reference, judge: Reader, prompts: Int[Tensor, "num length"],
                    texts: Mapping[int, Texts | None], settings: Mapping[str, int]) -> Quality:
    """The judge's preference for a baseline (`twin`) over this model, paired by prompt, at equal diversity.

    The baseline samples at temperature 1 and its own depth: `twin_judged_nats`, `twin_distinct_2`. At each depth, the
    model samples at temperature 1: `judged_behind_twin`, nats/token, and `judged_perplexity_percent`; then at the
    temperature that gives the baseline's distinct-2: `matched_nats`, `matched_distinct_2`, `matched_behind_twin`,
    `matched_perplexity_percent`; or only `unmatched_distinct_2`, the nearest, if no temperature reaches it.

    The two diversities are equal within `TOLERANCE`. The intervals are over prompts. texts: depth -> the model's texts
    at temperature 1 with this seed, None if not yet written. settings: num_tokens and seed of `write_texts`.
    """
    if settings["num_tokens"] < 2:
        raise UserError("texts of one token have no distinct-2 to match; set evaluation.sample_length to at least 2")
    found = Quality()
    reference = write_texts(twin.objective, prompts, twin.depth, **settings)
    theirs, share = judge.read(prompts, reference).per_token, distinct(as_lists(reference), 2)
    judged, named = {"by": judge.name, "twin": twin.name}, {"twin": twin.name}
    found.take("twin_judged_nats", theirs, {"depth": twin.depth, **judged})
    found.rows.append(_distinct_2("twin_distinct_2", reference, {"depth": twin.depth, **named}))
    for depth, own in texts.items():
        write = partial(write_texts, objective, prompts, depth, **settings)
        own = write() if own is None else own
        found.take_behind("judged", judge.read(prompts, own).per_token - theirs, {"depth": depth, **judged})
        matched = match_distinct(write, share, start=own)
        fields = {"depth": depth, "temperature": matched.temperature}
        if not matched.reached:
            found.rows.append(_distinct_2("unmatched_distinct_2", matched.texts, named | fields))
            continue
        nats = judge.read(prompts, matched.texts).per_token
        found.take("matched_nats", nats, judged | fields)
        found.rows.append(_distinct_2("matched_distinct_2", matched.texts, named | fields))
        found.take_behind("matched", nats - theirs, judged | fields)
    return found


def _distinct_2(metric: str, texts: Texts, fields: Mapping[str, Any]) -> Row:
    mean, spread = distinct(as_lists(texts), 2), jackknife(as_lists(texts), 2)
    return Row(metric, mean, mean - spread, mean + spread, len(texts), **fields)
