"""Settings of the training data: problems of a task, or text. Those of images are in `looped.config.images`."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from looped.config.base import Count, Depth, Positive, Section


class TaskConfig(Section):
    """Problems with checkable answers instead of text."""

    name: str | None = Field(
        default=None,
        description="a task (sudoku, prefix-sums, ...) or the dotted path of a custom class; null trains on text")
    options: dict[str, Any] = Field(default={}, description="arguments of the task, as {size: 6}")
    difficulty: tuple[Count, Count] | None = Field(
        default=None, description="lowest and highest trained difficulty; null: the task's own range")
    per_problem: bool = Field(
        default=True,
        description="draw a difficulty for each problem; false: one for each batch, which then is not padded where "
                    "the difficulty decides the size; for a range of task.difficulty")
    layout: Literal["full", "causal"] = Field(
        default="full", description="all cells at once, each attending to all others; or from left to right")
    window: Depth | None = Field(
        default=None,
        description="under layout full, local attention with this Chebyshev radius in cells, so that the learned "
                    "function is the same at any size; null: global")

    @model_validator(mode="after")
    def _check_range(self):
        if self.difficulty is not None and self.difficulty[0] > self.difficulty[1]:
            raise ValueError(f"difficulty {list(self.difficulty)} is descending; write [lowest, highest]")
        if self.window is not None and self.layout == "causal":
            raise ValueError(f"window {self.window} is for cells that are predicted together; set task.layout to full")
        return self


class DomainConfig(Section):
    """A custom kind of data."""

    name: str | None = Field(
        default=None,
        description="dotted path of a subclass of looped.domains.Domain, whose data replace text, a task or images")
    options: dict[str, Any] = Field(default={}, description="options of the custom kind of data")


class SourceConfig(Section):
    """A source of text. With neither `path` nor `dataset`: the Python standard library of this interpreter."""

    path: tuple[str, ...] = Field(
        default=(), description="files, folders or globs of text, JSON, CSV, parquet or Arrow, plain or compressed")
    dataset: str | None = Field(default=None, description="name (or local path) for datasets.load_dataset")
    dataset_config: str | None = Field(default=None, description="configuration name of the dataset")
    split: str = Field(default="train", description="split of the dataset")

    @model_validator(mode="before")
    @classmethod
    def _one_path(cls, values):
        if isinstance(values, dict) and isinstance(values.get("path"), str):
            return {**values, "path": (values["path"],)}
        return values

    @model_validator(mode="after")
    def _check_source(self):
        if self.path and self.dataset:
            raise ValueError("path and dataset are both set; keep one")
        return self


class MixedSource(SourceConfig):
    """One of the sources of a mixture."""

    weight: Positive = Field(
        default=1.0, description="the source's part of the training sequences, in proportion to the other weights")
    text_field: str | None = Field(default=None, description="as data.text_field, which null stands for")
    max_bytes: int | None = Field(default=None, ge=1, description="as data.max_bytes, which null stands for")


LEAST_SHARE = Fraction(1, 10_000)
"""The smallest part of the training sequences that a source can have."""


class DataConfig(SourceConfig):
    """Text and tokenizer. With none of `path`, `dataset` and `mixture`: the Python standard library of this
    interpreter."""

    mixture: dict[str, MixedSource] = Field(
        default={},
        description="several sources instead of one, by name, as {web: {path: web, weight: 0.7}, code: {dataset: "
                    "org/code, weight: 0.3}}; each has path, dataset, dataset_config, split, text_field and max_bytes "
                    "as here, and a weight, its part of the training sequences")
    streaming: Literal[False, True, "endless"] = Field(
        default=False,
        description="stream the dataset instead of storing it. true: its first max_bytes, read at every start; "
                    "endless: all of it, and again from the beginning, encoded by `tokenizer` as it is trained on and "
                    "never stored; its place is in the checkpoints")
    text_field: str = Field(
        default="text",
        description="field that holds the text in JSON, CSV, parquet, Arrow and datasets; meta.text is one within "
                    "another")
    max_bytes: int = Field(default=32_000_000, ge=1, description="text beyond this many bytes is not read")
    tokenizer: str | None = Field(
        default=None,
        description="a tokenizer.json, a folder that save_pretrained wrote, or a name on the Hugging Face hub, as in "
                    "org/name or org/name@revision; null trains a byte-level BPE")
    vocab_size: int = Field(default=1024, ge=257, description="size of the trained vocabulary")
    length: int = Field(default=128, ge=2, description="tokens per training sequence")
    documents: Literal["packed", "separate"] = Field(
        default="packed",
        description="attention in a training sequence that holds parts of several documents. packed: over the whole "
                    "sequence; separate: within each document, with positions restarting at each, which is better for "
                    "documents shorter than length")
    heldout: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.05, description="fraction of the documents held out")
    heldout_bytes: int = Field(
        default=1_000_000, ge=1,
        description="under streaming endless, the first documents are held out, up to this many bytes")
    cache_dir: str | None = Field(
        default=None, description="folder of token files; null means $LOOPED_CACHE or ~/.cache/looped")

    @model_validator(mode="after")
    def _check_mixture(self):
        for name in ("path", "dataset"):
            if self.mixture and getattr(self, name):
                raise ValueError(f"mixture and {name} are both set; keep one, or make {name} one of the sources")
        for name in self.mixture:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"mixture has a source {name!r}; name it by letters, digits, - and _")
        for name, share in self.shares.items():
            if share < LEAST_SHARE:
                raise ValueError(f"mixture.{name} has {float(share):.2g} of the training sequences, and "
                                 f"{float(LEAST_SHARE):g} is the least; raise its weight, or leave it out")
        return self

    @model_validator(mode="after")
    def _check_stream(self):
        if self.streaming == "endless" and self.dataset is None:
            raise ValueError("streaming endless is for a dataset, and none is set; set dataset to a name or local path "
                             "for datasets.load_dataset, or leave streaming out")
        if self.streaming == "endless" and self.tokenizer is None:
            raise ValueError("streaming endless needs a tokenizer, since none can be trained on text that is yet to "
                             "come; set tokenizer to a tokenizer.json or a name on the Hugging Face hub")
        return self

    @property
    def shares(self) -> Mapping[str, Fraction]:
        """Name of each source of the mixture -> its part of the training sequences, by name; they add up to 1."""
        weights = {name: Fraction(repr(source.weight)) for name, source in sorted(self.mixture.items())}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def of_source(self, name: str) -> "DataConfig":
        """The settings of a source of the mixture alone."""
        source = self.mixture[name]
        own = {key: getattr(source, key) for key in SourceConfig.model_fields}
        limits = {"text_field": source.text_field or self.text_field, "max_bytes": source.max_bytes or self.max_bytes}
        return self.model_copy(update={"mixture": {}, **own, **limits})
