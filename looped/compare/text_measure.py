"""Measurement of runs on text: losses over depth, samples, and samples compared with the ar baseline's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from looped.compare.curve import Metric
from looped.compare.measure import Common, MeanMeasured, Measurer
from looped.compare.plan import AGAIN, Plan, RunSpec
from looped.data.text import TextData
from looped.data.token_numbers import tokenizer_of
from looped.devices import CPU, Placement
from looped.evaluation.depth_sweep import evaluate_depth, evaluate_samples
from looped.evaluation.intervals import Clusters, documents_of
from looped.evaluation.judge import Judge
from looped.evaluation.plots import AXES
from looped.evaluation.sample_quality import Quality, Reference, matched_quality
from looped.inference.sequence_batch import as_lists
from looped.tensor_types import Float, Int
from looped.training.checkpoint import newest_hash
from looped.training.runs import Run

NEXT_TOKEN = Metric("next_token", "loss", " as a next-token predictor", AXES["nats_per_token"], higher_is_better=False,
                   worst=math.inf, examples="sequences", is_share=False)


@dataclass(frozen=True)
class TextMeasured(MeanMeasured):
    """One measured run: `rows` and `samples` as in an `Evaluation`; `losses[metric][depth]`: one value per held-out
    sequence (or prompt); `clusters`: the document in which each sequence begins, which measured runs always have."""

    gauge = NEXT_TOKEN
    losses: dict[str, dict[int, Float[Tensor, "num"]]]
    samples: list[dict[str, Any]]
    clusters: Clusters | None = None

    @property
    def units(self) -> str:
        return "documents" if self.clusters is not None and self.clusters.suffice else self.gauge.examples

    @property
    def examples(self) -> str:
        of = "" if self.clusters is None else f" of {self.clusters.counted}"
        return f"{super().examples}{of}"

    @property
    def followed(self) -> Float[Tensor, "num"]:
        """Nats/token as a next-token predictor: a denoiser at sigma_max, a loop at `recurrence.mean`; for masked
        diffusion its bound."""
        for metric in ("nats_at_sigma_max", "nats_bound"):
            if metric in self.losses:
                return self.losses[metric][1]
        return self.losses["nats_per_token"][self.place.config.main_depth]

    @property
    def by_depth(self) -> dict[int, float]:
        return {depth: losses.mean().item() for depth, losses in self.losses["nats_per_token"].items()}

    def figure(self, metric: str, depth: int, field: str = "mean") -> float | None:
        """A field of the row of a metric at a depth; None if there is no such row."""
        return next((row[field] for row in self.rows if (row["metric"], row.get("depth")) == (metric, depth)), None)


class TextMeasurer(Measurer):
    """Evaluates runs on text, which is read once and only if a run needs an evaluation."""

    keys: ClassVar[frozenset[str]] = frozenset({"losses", "samples", "places"})

    def __init__(self, plan: Plan, finished: list[RunSpec], placement: Placement = CPU):
        super().__init__(plan, finished, placement)
        self.text: TextData | None = None

    def made(self, found: Mapping[str, Any], common: Common) -> TextMeasured:
        losses = {metric: {int(depth): torch.tensor(values, dtype=torch.float64) for depth, values in by_depth.items()}
                  for metric, by_depth in found["losses"].items()}
        return TextMeasured(*common, losses=losses, samples=found["samples"],
                            clusters=documents_of(found["places"]))

    def twin_of(self, place: RunSpec) -> RunSpec | None:
        """The autoregressive run of the same seed, the baseline for this run's samples."""
        return self._autoregressive(place.seed)

    def judge_of(self, place: RunSpec) -> RunSpec | None:
        """The autoregressive run of the next seed, which judges both; None if there is none."""
        seed = (place.seed + 1) % self.plan.num_seeds
        return self._autoregressive(seed) if seed != place.seed else None

    def _autoregressive(self, seed: int) -> RunSpec | None:
        return next((other for other in self.finished if other.arm.config.rule.baseline and other.seed == seed),
                    None)

    def inputs(self, place: RunSpec) -> dict[str, Any]:
        others = [other and newest_hash(other.run) for other in (self.twin_of(place), self.judge_of(place))]
        return super().inputs(place) | {"others": others}

    def evaluate(self, place: RunSpec) -> dict[str, Any]:
        run = self.load(place)
        self.text = self.text or run.data
        run.data = self.text  # has the same tokenizer
        run.identity.check(self.text, run.path, AGAIN)
        c, seed, decode = run.config.evaluation, run.config.seed, tokenizer_of(self.text).decode
        sequences = self.sequences(c.num_sequences)
        places = self.text.heldout.places(len(sequences), run.config.data.length)
        sweep = evaluate_depth(run.objective, sequences, self.depths(place), seed=seed, clusters=documents_of(places),
                               bytes_per_token=self.text.bytes_per_token, batch_size=c.batch_size, num_levels=c.levels)
        prompts = self.sequences(c.num_samples)[:, : c.prompt_length]
        rows, texts = evaluate_samples(run.objective, prompts, place.text_depths, num_tokens=c.sample_length, seed=seed)
        quality = self.quality(place, run, prompts, texts)
        samples = [{"depth": depth, "prompt": decode(prompt), "text": decode(text)} for depth in texts
                   for prompt, text in zip(prompts.tolist(), as_lists(texts[depth]), strict=True)]
        losses = {metric: {str(depth): values.tolist() for depth, values in by_depth.items()}
                  for metric, by_depth in (sweep.per_example | quality.per_example).items()}
        return {"rows": [row.as_dict() for row in [*sweep.rows, *rows, *quality.rows]], "losses": losses,
                "samples": samples, "places": places}

    def sequences(self, num: int) -> Int[Tensor, "num length_and_one"]:
        """Up to `num` held-out sequences: the same for every arm and seed, and as in training."""
        length = self.plan.config.data.length
        tokens = self.text.heldout.sequences(min(num, self.text.heldout.windows(length)), length)
        return tokens.to(self.placement.device)

    def quality(self, place: RunSpec, run: Run, prompts: Int[Tensor, "num length"],
                texts: dict[int, Tensor]) -> Quality:
        """The run's samples compared with the baseline's at equal diversity; empty without a baseline or a judge."""
        twin, judge = self.twin_of(place), self.judge_of(place)
        if twin is None or judge is None or not texts:
            return Quality()
        reader = self.load(judge)
        reference = Reference(twin.name, self.load(twin).objective, twin.config.main_depth)
        reads = Judge(judge.name, reader.objective, judge.config.main_depth, reader.tokenizer.json())
        return matched_quality(run.objective, reference, reads, prompts, texts,
                               {"num_tokens": run.config.evaluation.sample_length, "seed": place.seed})
