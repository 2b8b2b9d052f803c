"""Settings of the training data: problems of a task, or text. Those of images are in `looped.config.images`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from looped.config.base import Count, Depth, Section


class TaskConfig(Section):
    """Problems with checkable answers instead of text."""

    name: str | None = Field(
        default=None,
        description="a task (sudoku, prefix-sums, ...) or the dotted path of a custom class; null trains on text")
    options: dict[str, Any] = Field(default={}, description="arguments of the task, as {size: 6}")
    difficulty: tuple[Count, Count] | None = Field(
        default=None, description="lowest and highest trained difficulty; null: the task's own range")
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


class DataConfig(Section):
    """Text and tokenizer. With neither `path` nor `dataset`: the Python standard library of this interpreter."""

    path: tuple[str, ...] = Field(
        default=(), description="files, folders or globs of text, JSON, CSV, parquet or Arrow, plain or compressed")
    dataset: str | None = Field(default=None, description="name (or local path) for datasets.load_dataset")
    dataset_config: str | None = Field(default=None, description="configuration name of the dataset")
    split: str = Field(default="train", description="split of the dataset")
    streaming: bool = Field(default=False, description="stream the dataset and stop after max_bytes")
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
    cache_dir: str | None = Field(
        default=None, description="folder of token files; null means $LOOPED_CACHE or ~/.cache/looped")

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
