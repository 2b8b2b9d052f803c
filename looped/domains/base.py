"""Base class of domains: training batches, validation, evaluation, generation and reports for one kind of data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from looped.config import Config
from looped.config.data_kinds import Kind
from looped.data.batch import Batch
from looped.data.from_config import Found, open_data
from looped.data.image_batches import ImageSpec, SoughtImages
from looped.errors import UserError, flag_of
from looped.evaluation.metric_rows import Keep, Row
from looped.evaluation.options import Options
from looped.evaluation.result_files import EvaluationFiles
from looped.evaluation.workers import Workers
from looped.objectives.base import Objective
from looped.reports.runs import depth_table, draw_evaluation
from looped.reports.sections import Section


@dataclass(frozen=True)
class Inputs:
    """Training data to measure the cost of a step on. micro_batches: the parts of an optimiser step. num_rows: rows per
    sequence of the first part. vocab_size: number of tokens, symbols or classes. picture: the size of images, None
    without images. end_of_text: for text, the token that ends a document."""

    micro_batches: Sequence[Tensor | Batch | SoughtImages]
    num_rows: int
    vocab_size: int
    picture: ImageSpec | None = None
    end_of_text: int | None = None


@dataclass(frozen=True)
class Request:
    """A request to generate; each domain uses some of its fields (`Domain.asks`). prompts(): reads the prompts."""

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
    """The results of an evaluation. rows: all metrics."""

    rows: list[Row]

    def sections(self, name: str) -> list[Section]:
        """The tables for the terminal, for a run of this name."""
        return depth_table({name: [row.as_dict() for row in self.rows]})

    def leave(self, files: EvaluationFiles, config: Config, about: About) -> str:
        """Write pictures or a report next to the rows; return a sentence with their paths."""
        draw_evaluation(files, config, about.name)
        return f"pictures in {files.folder / 'plots'}, rows in {files.folder / 'eval'}"


class Domain:
    """One kind of data. A custom one (`domain.name`) also defines `kind` and `find`."""

    name: str
    kind: Kind
    """For a custom domain: the settings it reads, its model, the rules it supports."""
    examples = "examples"
    """For a custom domain: the noun for its held-out items; `kind.metric` is the fraction of them that is correct."""
    flags: frozenset[str] = frozenset()
    """The options of `looped eval` that this domain supports."""
    unit = " nats"
    """The unit of the training loss."""

    asks: frozenset[str] = frozenset()
    """The fields of a `Request` that this domain uses, besides depth and num_samples."""
    end_to_end = "ar"
    """The rule that trains all layers end to end, to which `looped bench memory` compares blocks."""
    makes = ""
    """The output that `looped generate` gives, as in "writes text"; empty if there is none."""

    def hardest(self, config: Config) -> str:
        """A clause about the highest trained difficulty; "" if the data have no difficulty."""
        return ""

    def does(self, config: Config) -> str:
        """The predicate that describes a run in a sentence, as "solves sudoku"."""
        raise NotImplementedError

    def find(self, config: Config) -> Found:
        """For a custom domain: its data, as `looped.data.from_config.find_data` returns them. Raises UserError."""
        raise UserError(f"domain.name {config.domain.name} does not define how its data are found; give its class a "
                        f"find(config) that returns a looped.data.from_config.Found")

    def vocab_size(self, config: Config) -> int:
        """For a custom domain: the number of tokens, symbols or classes."""
        return open_data(config).vocab_size

    def first_inputs(self, config: Config) -> Inputs:
        """The first training batch of a run of the config, the same on every call. Raises UserError if the data are not
        available."""
        data = open_data(config)
        parts = micro_batches(data.train, config)
        return Inputs(parts, parts[0].num_rows, data.vocab_size, data.picture)

    def typical_inputs(self, config: Config) -> Inputs:
        """Micro-batches whose sequences have together the mean length of training, padded as much as is usual."""
        inputs = self.first_inputs(config)
        return replace(inputs, micro_batches=inputs.micro_batches[:1])

    def solver_step(self, objective: Objective, parts: Sequence[Any]) -> Callable[[], Tensor] | None:
        """One network evaluation of micro-batches by the block with the highest noise; None unless depth is only a
        number of solver steps."""
        return None

    def order(self, config: Config) -> dict[str, int]:
        """Arguments that determine the order of the training data, besides step, batch size and seed."""
        return {}

    def place(self, data: Any, step: int) -> Any:
        """State that a checkpoint keeps, for this process, of training data that are no function of the step, so that
        training resumes at `step`; None for others."""
        return None

    def go_to(self, data: Any, places: Sequence[Any] | None, rank: int, num_processes: int) -> None:
        """Move such data to the places of all processes in a checkpoint, or to their beginning if there is none. Raises
        UserError."""

    def batches(self, data: Any, config: Config) -> Iterable[Tensor | Batch]:
        """Held-out data for the training loss."""
        raise NotImplementedError

    def by_source(self, data: Any, config: Config, figures: Callable[[Any, Config], dict[str, float]]
                  ) -> dict[str, float]:
        """Validation metrics of data that can have several sources; `figures` gives those of one."""
        return figures(data, config)

    def validate(self, objective: Objective, data: Any, config: Config, own: Own,
                 workers: Workers) -> dict[str, float]:
        """Validation metrics during training; `own` gives the training loss on held-out data. All processes of a run
        call it, and the first one's result counts; `workers.over` divides batches among them."""
        raise NotImplementedError

    def preview(self, objective: Objective, data: Any, config: Config, workers: Workers) -> str | np.ndarray:
        """A sample text or answer by the current weights, or a picture of the images they make. All processes of a run
        call it, and the first one's result counts; `workers.over` divides work among them."""
        raise NotImplementedError

    def check(self, config: Config, flags: Iterable[str], run: Path) -> None:
        """Raises UserError for options of an evaluation that this domain does not support."""
        for flag in flags:
            if flag not in self.flags:
                raise UserError(f"{flag_of(flag)} is for {OPTIONS[flag]}, and {run} {self.does(config)}; leave it out"
                                + ("; --evaluation.trajectories sets those of an answer" * (flag == "trajectories")))

    def sequences(self, data: Any, config: Config, options: Options) -> list[dict[str, Any]]:
        """The ids of the held-out items (sequences, problems, images) as lines of eval/sequences.jsonl: per column, a
        list in the order of the values in eval/examples.jsonl, or one value for all; no line if there are no ids."""
        return []

    def evaluate(self, objective: Objective, data: Any, config: Config, depths: Sequence[int], options: Options, *,
                 keep: Keep) -> Evaluated:
        """All that `looped eval` measures; `keep` is called with each finished part."""
        raise NotImplementedError

    def generate(self, run: Any, request: Request) -> Iterator[str]:
        """Output of a loaded run, as lines to print. Raises UserError."""
        raise UserError(f"{run.path} {self.does(run.config)} and writes no text; see its answers with looped eval "
                        f"{run.path}")


def micro_batches(stream: Any, config: Config) -> list[Any]:
    """The micro-batches of the first optimiser step of a stream of training data."""
    c = config.training
    size = c.batch_size // c.accumulation
    return [stream.batch(0, batch_size=c.batch_size, seed=config.seed, rows=range(first, first + size))
            for first in range(0, c.batch_size, size)]


OPTIONS = {"trajectories": "text", "probes": "text", "twin": "text", "judge": "text", "match": "text", "mauve": "text",
           "text": "text", "tasks": "text", "puzzles": "tasks", "difficulties": "tasks", "exits": "tasks and text",
           "features": "runs that make images", "per_token": "text"}
"""Option of `looped eval` -> the kind of run that it is for, in words."""
