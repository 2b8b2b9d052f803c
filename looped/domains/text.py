"""The domain of text: losses in nats/token and bits/byte by depth, and generated text."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from looped.config import Config
from looped.data.eval_text import MeasuredText
from looped.data.from_config import vocab_size_of
from looped.data.token_numbers import tokenizer_of
from looped.data.token_windows import Placeless
from looped.domains.base import About, Domain, Evaluated, Inputs, Options, Own, Request, micro_batches
from looped.errors import UserError, flag_of
from looped.evaluation.depth_sweep import evaluate_run, evaluate_samples, num_windows
from looped.evaluation.early_exit import losses_with_exits, text_exit_rows
from looped.evaluation.intervals import Clusters
from looped.evaluation.likelihood import main_losses, token_losses_by_depth
from looped.evaluation.metric_rows import Keep, Row, summarise
from looped.evaluation.probes import Probes, probe, probe_table
from looped.evaluation.result_files import PROBES, EvaluationFiles
from looped.evaluation.solving import share_cell
from looped.evaluation.token_losses import TokenLosses, add_tokens, pandas_for
from looped.evaluation.workers import Workers
from looped.inference.generate import generate
from looped.inference.rollout import rollout_of
from looped.inference.sequence_batch import Ending, as_lists
from looped.objectives.base import Objective
from looped.reports.sections import Prose, Section, Table
from looped.rng import generator
from looped.tensor_types import Float, Int


@dataclass(frozen=True)
class TextEvaluated(Evaluated):
    """The depth sweep and samples of a run on text, the losses on the sources of a mixture, and its exits, probes and
    per-token losses if requested. `documents`: the document in which each sequence begins."""

    exits: Sequence[Row] = ()
    probes: Probes | None = None
    tokens: Sequence[TokenLosses] = ()
    sources: Sequence[Row] = ()
    documents: Clusters | None = None

    def sections(self, name: str) -> list[Section]:
        num = next((row.n for row in self.rows if row.metric == "nats_per_token"), 0)
        said = f"nats/token over {num} held-out sequence{'s' * (num != 1)}{', too few for an interval' * (num == 1)}"
        if self.documents is not None and num > 1:
            taken = "" if self.documents.suffice else ", which their intervals take as independent"
            said = f"{said} of {self.documents.counted}{taken}"
        found = [*super().sections(name), Prose(said), self._sources(), self._exits()]
        if self.probes is None:
            return found
        said = "\n".join(self.probes.sentences) or "nothing is out of order"
        return [*found, Prose(f"probes:\n{probe_table(self.probes.rows)}"), Prose(said)]

    def _sources(self) -> Table:
        figures = {(row.by, row.depth, row.metric): row for row in self.sources}
        lines = [[str(by), str(depth), str(row.n), f"{row.mean:.3f}",
                  f"{figures[by, depth, 'bits_per_byte_by_source'].mean:.3f}"]
                 for (by, depth, metric), row in figures.items() if metric == "nats_per_token_by_source"]
        return Table(["source", "depth", "sequences", "nats/token", "bits/byte"], lines)

    def _exits(self) -> Table:
        figures = {(row.by, row.metric): row for row in self.exits}
        lines = [[by, f"{row.mean:.2f} of {row.depth}", f"{row.layer_forwards:,.1f}",
                  *(share_cell(figures[by, name]) for name in ("nats_with_exit", "lost_by_exit"))]
                 for (by, metric), row in figures.items() if metric == "steps_used"]
        return Table(["exit", "steps/token", "layer forwards", "nats/token", "lost"], lines)

    def leave(self, files: EvaluationFiles, config: Config, about: About) -> str:
        if self.probes is not None:
            files.add({PROBES: [*(row.as_dict() for row in self.probes.rows),
                                *({"verdict": sentence} for sentence in self.probes.sentences)]})
        if self.tokens:
            add_tokens(files, self.tokens)
        return super().leave(files, config, about)


@dataclass(frozen=True)
class RandomText(Placeless):
    """A text of random tokens, with the interface of a stream of training data."""

    vocab_size: int
    length: int

    def batch(self, step: int, *, batch_size: int, seed: int,
              rows: range | None = None) -> Int[Tensor, "rows length_and_one"]:
        """The given rows (all by default) of a batch, the same for every step."""
        gen = generator(seed, "bench")
        tokens = torch.randint(self.vocab_size, (batch_size, self.length + 1), generator=gen)
        return tokens if rows is None else tokens[rows.start : rows.stop]


class Text(Domain):
    """Held-out text."""

    name = "text"
    flags: ClassVar[frozenset[str]] = frozenset({
        "trajectories", "probes", "twin", "judge", "match", "mauve", "text", "exits", "tasks",
        "per_token"})
    asks: ClassVar[frozenset[str]] = frozenset({
        "prompt", "prompts", "num_tokens", "temperature", "top_k", "top_p", "stop", "past_the_end", "json"})
    makes = "writes text"

    def does(self, config: Config) -> str:
        return "is trained on text"

    def first_inputs(self, config: Config) -> Inputs:
        """Random tokens with the shape and vocabulary of real ones, so that no corpus is read. The end of a text is as
        frequent as any other token; a document mask costs the same wherever documents end."""
        vocab_size, length = vocab_size_of(config), config.data.length
        return Inputs(micro_batches(RandomText(vocab_size, length), config), length, vocab_size, end_of_text=0)

    def typical_inputs(self, config: Config) -> Inputs:
        """One long document."""
        size = config.training.batch_size // config.training.accumulation
        tokens = torch.ones(size, config.data.length + 1, dtype=torch.long)
        return Inputs([tokens], config.data.length, vocab_size_of(config), end_of_text=0)

    def order(self, config: Config) -> dict[str, int]:
        return {"length": config.data.length}

    def batches(self, data: MeasuredText, config: Config) -> Iterable[Tensor]:
        return heldout_tokens(data, config).split(config.evaluation.batch_size)

    def place(self, data: Any, step: int) -> Any:
        return data.train.place(step)

    def go_to(self, data: Any, places: Sequence[Any] | None, rank: int, num_processes: int) -> None:
        data.train.go_to(places, rank, num_processes)

    def by_source(self, data: MeasuredText, config: Config, figures: Callable[[MeasuredText, Config], dict[str, float]]
                  ) -> dict[str, float]:
        if not parts_of(data):
            return figures(data, config)

        def of_some(part: MeasuredText, num: int) -> dict[str, float]:
            sizes = config.evaluation.model_copy(update={"num_sequences": num})
            return figures(part, config.model_copy(update={"evaluation": sizes}))

        return data.by_source(config.evaluation.num_sequences, of_some)

    def validate(self, objective: Objective, data: MeasuredText, config: Config, own: Own,
                 workers: Workers) -> dict[str, float]:
        """The training loss, and `next_token`, which can be compared between objectives (`main_losses`), of fixed
        held-out sequences with the same noise at every call."""
        tokens, c = heldout_tokens(data, config).to(next(objective.parameters()).device), config.evaluation
        losses = main_losses(objective, tokens, config.main_depth, seed=config.seed, batch_size=c.batch_size,
                             num_levels=c.levels, workers=workers)
        return own() | {"next_token": losses.mean().item()}

    def preview(self, objective: Objective, data: MeasuredText, config: Config, workers: Workers) -> str:
        """Continuations of held-out prompts, one per line, by depth, with their distinct-2. Each depth is the work of
        one process."""
        c = config.evaluation
        num = min(c.num_samples, data.heldout.windows(config.data.length))
        prompts = data.heldout.sequences(num, config.data.length)[:, : c.prompt_length]
        prompts = prompts.to(next(objective.parameters()).device)
        decode = tokenizer_of(data).decode

        def at(depth: int) -> str:
            rows, samples = evaluate_samples(objective, prompts, [depth], num_tokens=c.sample_length, seed=config.seed)
            shares = [f"distinct-2 {row.mean:.3f}" for row in rows if row.metric == "distinct_2"] or ["no samples"]
            return "\n".join([f"depth {depth}, {shares[0]}",
                              *(f"  {decode(text)!r}" for texts in samples.values() for text in as_lists(texts))])

        return "\n".join(workers.over(dict.fromkeys(c.sample_depths), at))

    def check(self, config: Config, flags: Iterable[str], run: Path) -> None:
        super().check(config, flags := list(flags), run)
        for flag in ("probes", "twin", "trajectories", "per_token"):
            if flag in flags and config.rule.hides:
                raise UserError(f"{flag_of(flag)} is for rules that predict the next token, and {run} predicts masked "
                                f"ones; leave it out")
        if "per_token" in flags:
            pandas_for("--per-token")

    def sequences(self, data: MeasuredText, config: Config, options: Options) -> list[dict[str, Any]]:
        return [data.heldout.places(num_windows(data, config), config.data.length)]

    def evaluate(self, objective: Objective, data: MeasuredText, config: Config, depths: Sequence[int],
                 options: Options, *, keep: Keep) -> TextEvaluated:
        rollout = rollout_of(objective)
        if options.trajectories and not rollout.samples:
            raise UserError(f"--trajectories {options.trajectories} samples the solver of a denoiser, and objective "
                            f"{config.objective} has none; leave it out")
        if options.exits:
            rollout.check_exits(options.exits)
        result = evaluate_run(objective, data, config, depths, options, keep=keep)
        by_depth, exits, each = result.per_example["nats_per_token"], [], []
        size = {"seed": config.seed, "batch_size": config.evaluation.batch_size}
        tokens = data.heldout.sequences(num_windows(data, config), config.data.length)
        tokens = tokens[: config.evaluation.num_sequences].to(next(objective.parameters()).device)
        if options.per_token:
            losses = token_losses_by_depth(objective, tokens, depths, **size)
            each += [TokenLosses(tokens, nats, depth) for depth, nats in zip(sorted(by_depth), losses, strict=True)]
        documents = result.documents
        sources = by_source(data, config, by_depth, documents)
        if sources:
            keep(sources)
        if options.exits:
            left = losses_with_exits(objective, tokens, max(depths), options.exits, **size)
            for part in text_exit_rows(objective, left, max(depths), options.exits, documents):
                keep(part)
                exits += part
            each += [TokenLosses(tokens, early.nats, max(depths), rule.name, early.used)
                     for rule, early in zip(options.exits, left[1:], strict=True) if options.per_token]
        rows = [*result.rows, *sources, *exits]
        if not options.probes and options.twin is None:
            return TextEvaluated(rows, exits, tokens=each, sources=sources, documents=documents)
        found = probe(objective, tokens, by_depth, vocab_size=data.vocab_size, twin=options.twin, seed=config.seed,
                      clusters=documents)
        return TextEvaluated([*rows, *found.rows], exits, found, each, sources, documents)

    def generate(self, run: Any, request: Request) -> Iterator[str]:
        """Continuations of all prompts, computed in one batch; the n-th of each draws as the n-th of a prompt alone."""
        prompts = [prompt for prompt in request.prompts() for _ in range(request.num_samples)]
        tokenizer = run.tokenizer
        ids = [torch.tensor(tokenizer.encode(prompt), dtype=torch.long) for prompt in prompts]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        tokens = generate(run.objective, padded.to(run.device), lengths=torch.tensor([len(row) for row in ids]),
                          num_tokens=request.num_tokens, depth=request.depth, temperature=request.temperature,
                          top_k=request.top_k, top_p=request.top_p, seed=run.config.seed, stop=request.stop,
                          rows=[*range(request.num_samples)] * (len(prompts) // request.num_samples),
                          decode=tokenizer.decode, past_the_end=request.past_the_end)
        ending = Ending(stop=request.stop, decode=tokenizer.decode)
        for prompt, text in zip(prompts, map(tokenizer.decode, as_lists(tokens)), strict=True):
            line = {"prompt": prompt, "depth": request.depth, "text": (text := ending.without_stop(text))}
            yield json.dumps(line) if request.json else prompt + text + "\n" * (len(prompts) > 1)


def parts_of(data: Any) -> Mapping[str, MeasuredText]:
    """The sources of a mixture by name; none of other data, among them those of custom classes."""
    return getattr(data, "parts", {})


def by_source(data: MeasuredText, config: Config, by_depth: Mapping[int, Float[Tensor, "num"]],
              documents: Clusters) -> list[Row]:
    """The losses of single held-out sequences by depth, as means of each source of a mixture; none of other text."""
    rows = []
    for name, part in parts_of(data).items():
        here = data.heldout.rows_of(name, num_windows(data, config), config.data.length)
        here = here[here < config.evaluation.num_sequences]
        for depth, losses in by_depth.items() if len(here) else ():
            of = {"by": name, "depth": depth, "clusters": documents[here]}
            rows += [summarise("nats_per_token_by_source", losses[here], **of),
                     summarise("bits_per_byte_by_source", part.nats_to_bits_per_byte(1) * losses[here], **of)]
    return rows


def heldout_tokens(data: MeasuredText, config: Config) -> Int[torch.Tensor, "rows length_and_one"]:
    """The held-out sequences of validation during training."""
    num = min(config.evaluation.num_sequences, data.heldout.windows(config.data.length))
    return data.heldout.sequences(num, config.data.length)
