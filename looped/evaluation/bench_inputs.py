"""The data of a benchmark's training steps: the first batch that a run of the config would be trained on.

Problems of a task are made and images are read, as in training. Of text, random tokens have the shape and the
vocabulary of real ones, so that no corpus need be read.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from looped.config import Config
from looped.data.batch import Batch
from looped.data.labelled import Picture, SoughtImages
from looped.data.opening import open_data, vocab_size_of
from looped.objectives.flops import rows_of
from looped.rng import generator

Inputs = Int[Tensor, "batch length_and_one"] | Batch | SoughtImages


@dataclass(frozen=True)
class RandomText:
    """A text of random tokens; the same members as a stream of training data."""

    vocab_size: int
    length: int

    def batch(self, step: int, *, batch_size: int, seed: int,
              rows: range | None = None) -> Int[Tensor, "rows length_and_one"]:
        """The given rows (all by default) of a batch, the same for every step."""
        gen = generator(seed, "bench")
        tokens = torch.randint(self.vocab_size, (batch_size, self.length + 1), generator=gen)
        return tokens if rows is None else tokens[rows.start : rows.stop]


@dataclass(frozen=True)
class BenchInputs:
    """The data of one timed optimiser step. micro_batches: the parts it is split into. vocab_size: tokens, symbols or
    classes. picture: the size of images, None where there are none. configs: for each micro-batch the config whose
    closed forms of cost have the length of its sequences. end_of_text: of text, the token that ends a document, which
    random tokens hold once in a vocabulary (a mask of documents costs the same wherever they end)."""

    micro_batches: list[Inputs]
    vocab_size: int
    picture: Picture | None
    configs: list[Config]
    end_of_text: int | None


def bench_inputs(config: Config) -> BenchInputs:
    """The first batch of a config, the same on every call. Raises UserError for data that cannot be had."""
    c = config.training
    data = open_data(config) if config.is_task or config.is_images else None
    stream = RandomText(vocab_size_of(config), config.data.length) if data is None else data.train
    size = c.batch_size // c.accumulation
    parts = [stream.batch(0, batch_size=c.batch_size, seed=config.seed, rows=range(first, first + size))
             for first in range(0, c.batch_size, size)]
    return BenchInputs(parts, stream.vocab_size if data is None else data.vocab_size, data and data.picture,
                       [_of_length(config, part) for part in parts], 0 if data is None else None)


def _of_length(config: Config, part: Inputs) -> Config:
    """The config, for a task at the trained difficulty whose problems are as long as this batch is filled up to be; the
    closed forms of cost are otherwise those of a problem in the middle of the range."""
    if not config.is_task or rows_of(config) == part.targets.shape[1]:
        return config
    low, high = open_data(config).train.low, open_data(config).train.high
    levels = [config.replace(**{"task.difficulty": [level, level]}) for level in range(low, high + 1)]
    return min(levels, key=lambda level: abs(rows_of(level) - part.targets.shape[1]))
