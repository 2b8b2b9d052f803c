"""A domain: what is asked of a trained model on one kind of data, and how it is told."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from looped.config import Config
from looped.config.kinds import Kind
from looped.data.batch import Batch
from looped.data.labelled import Picture, SoughtImages
from looped.data.opening import Found, open_data
from looped.errors import UserError, flag_of
from looped.evaluation.options import Options
from looped.evaluation.rows import Keep, Row
from looped.evaluation.store import EvaluationFiles
from looped.objectives.base import Objective
from looped.reports.runs import depth_table, draw_evaluation
from looped.reports.sections import Section


@dataclass(frozen=True)
class Inputs:
    """Training data to measure the cost of a step on. micro_batches: the parts of an optimiser step. num_rows: those of
    a sequence of the first part. vocab_size: tokens, symbols or classes. picture: the size of images, None where there
    are none. end_of_text: of text, the token that ends a document."""

    micro_batches: Sequence[Tensor | Batch | SoughtImages]
    num_rows: int
    vocab_size: int
    picture: Picture | None = None
    end_of_text: int | None = None


@dataclass(frozen=True)
class Request:
    """A request to generate; each domain knows some of its fields (`Domain.asks`). `prompts` reads them."""

    prompts: Callable[[], list[str]]
    depth: int
    num_samples: int
    num_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    stop: tuple[str, ...]
    past_the_end: bool
    json: bool
    guidance: float | None
    out: Path | None


@dataclass(frozen=True)
class About:
    """Facts at the head of a report: the run's name, its step, the budgets spent, and its stamp."""

    name: str
    step: int
    spent: Mapping[str, float] = field(default_factory=dict)
    stamp: Mapping[str, Any] = field(default_factory=dict)
    measured_on: str = ""


Own = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation's figures. rows: all of them."""

    rows: list[Row]

    def sections(self, name: str) -> list[Section]:
        """The tables for the terminal, of a run of this name."""
        return depth_table({name: [row.as_dict() for row in self.rows]})

    def leave(self, files: EvaluationFiles, config: Config, about: About) -> str:
        """Write what belongs beside the rows, pictures or a report; a sentence on where that is."""
        draw_evaluation(files, config, about.name)
        return f"pictures in {files.folder / 'plots'}, rows in {files.folder / 'eval'}"


class Domain:
    """One kind of data. One's own (`domain.name`) also has a `kind` and says how its data are found."""

    name: str
    kind: Kind
    """Of one's own: the settings it reads, its model, the rules that are for it."""
    examples = "examples"
    """Of one's own: the noun of what is held out; `kind.metric` is the share of them that is right."""
    flags: frozenset[str] = frozenset()
    """The options of `looped eval` that mean something here."""
    unit = " nats"
    """Of the training loss."""

    asks: frozenset[str] = frozenset()
    """The fields of a `Request` that mean something here, besides depth and num_samples."""
    end_to_end = "ar"
    """The rule that trains all layers end to end, which `looped bench memory` sets blocks beside."""
    makes = ""
    """The output that a run can be asked for, as in "writes text"; empty where there is none."""

    def hardest(self, config: Config) -> str:
        """A clause about the hardest that is trained; "" where data have no difficulty."""
        return ""

    def does(self, config: Config) -> str:
        """The predicate of a run in a sentence, as in "solves sudoku"."""
        raise NotImplementedError

    def find(self, config: Config) -> Found:
        """Of one's own: the data, as `looped.data.opening.find_data` gives them. Raises UserError."""
        raise UserError(f"domain.name {config.domain.name} does not say how its data are found; give its class a "
                        f"find(config) that returns a looped.data.opening.Found")

    def vocab_size(self, config: Config) -> int:
        """Of one's own: tokens, symbols or classes."""
        return open_data(config).vocab_size

    def first_inputs(self, config: Config) -> Inputs:
        """The first batch that a run of the config is trained on, the same on every call. Raises UserError for data
        that cannot be had."""
        data = open_data(config)
        parts = micro_batches(data.train, config)
        return Inputs(parts, parts[0].num_rows, data.vocab_size, data.picture)

    def typical_inputs(self, config: Config) -> Inputs:
        """A micro-batch whose sequences are as long as the mean one of training."""
        inputs = self.first_inputs(config)
        return replace(inputs, micro_batches=inputs.micro_batches[:1])

    def solver_step(self, objective: Objective, parts: Sequence[Any]) -> Callable[[], Tensor] | None:
        """One reading of micro-batches by the block that owns the highest noise; None where depth is no solver's
        alone."""
        return None

    def order(self, config: Config) -> dict[str, int]:
        """Arguments that the order of the training data depends on besides step, batch size and seed."""
        return {}

    def batches(self, data: Any, config: Config) -> Iterable[Tensor | Batch]:
        """Held-out data for the training loss."""
        raise NotImplementedError

    def validate(self, objective: Objective, data: Any, config: Config, own: Own) -> dict[str, float]:
        """Validation metrics during training; `own` gives the training loss on held-out data."""
        raise NotImplementedError

    def preview(self, objective: Objective, data: Any, config: Config) -> str | np.ndarray:
        """A sample of what the weights of the moment write or answer; or a picture of what they make."""
        raise NotImplementedError

    def check(self, config: Config, flags: Iterable[str], run: Path) -> None:
        """Raises UserError for options of an evaluation that mean nothing here."""
        for flag in flags:
            if flag not in self.flags:
                raise UserError(f"{flag_of(flag)} is for {OPTIONS[flag]}, and {run} {self.does(config)}; leave it out"
                                + ("; --evaluation.trajectories sets those of an answer" * (flag == "trajectories")))

    def sequences(self, data: Any, config: Config, options: Options) -> list[dict[str, Any]]:
        """The ids of what is held out (sequences, problems, images) as lines of eval/sequences.jsonl: a list for each
        column, in the order of the values in eval/examples.jsonl, or one value for all; no line where there are none.
        """
        return []

    def evaluate(self, objective: Objective, data: Any, config: Config, depths: Sequence[int], options: Options, *,
                 keep: Keep) -> Evaluated:
        """All that `looped eval` measures; `keep` is given each part that is finished."""
        raise NotImplementedError

    def generate(self, run: Any, request: Request) -> Iterator[str]:
        """Output of a loaded run, as lines to print. Raises UserError."""
        raise UserError(f"{run.path} {self.does(run.config)} and writes no text; look at its answers with looped eval "
                        f"{run.path}")


def micro_batches(stream: Any, config: Config) -> list[Any]:
    """The first optimiser step of a stream of training data, in its parts."""
    c = config.training
    size = c.batch_size // c.accumulation
    return [stream.batch(0, batch_size=c.batch_size, seed=config.seed, rows=range(first, first + size))
            for first in range(0, c.batch_size, size)]


OPTIONS = {"trajectories": "text", "probes": "text", "twin": "text", "judge": "text", "match": "text", "mauve": "text",
           "text": "text", "tasks": "text", "difficulties": "tasks", "exits": "tasks and text",
           "features": "runs that make images", "per_token": "text"}
"""Option -> the kind of run that it is for, in words."""
