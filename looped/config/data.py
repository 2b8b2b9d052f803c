"""Settings of what is trained on: problems of a task, or text. Images have a file of their own (`config_images`)."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from looped.config.base import Count, Depth, Section


class TaskConfig(Section):
    """Problems with checkable answers instead of text."""

    name: str | None = Field(None, description="a task (sudoku, prefix-sums, ...) or the dotted path of a class of "
                                               "one's own; null trains on text")
    options: dict[str, Any] = Field({}, description="arguments of the task, as {size: 6}")
    difficulty: tuple[Count, Count] | None = Field(None, description="lowest and highest that are trained; null: the "
                                                                     "task's own range")
    layout: Literal["full", "causal"] = Field("full", description="all cells at once, each seeing all others; or from "
                                                                  "left to right")
    window: Depth | None = Field(None, description="under layout full a cell sees those at most so far away on every "
                                                   "axis, so that what is learned is the same at any size; null: all")

    @model_validator(mode="after")
    def _check_range(self):
        if self.difficulty is not None and self.difficulty[0] > self.difficulty[1]:
            raise ValueError(f"difficulty {list(self.difficulty)} runs downwards; write [lowest, highest]")
        if self.window is not None and self.layout == "causal":
            raise ValueError(f"window {self.window} is for cells that are sought together; set task.layout to full")
        return self


class DomainConfig(Section):
    """A kind of data of one's own."""

    name: str | None = Field(None, description="dotted path of a subclass of looped.domains.Domain, whose data are "
                                               "trained on in place of text, a task or images")
    options: dict[str, Any] = Field({}, description="options of that kind of data")


class DataConfig(Section):
    """Text and tokenizer. With neither `path` nor `dataset`: the Python standard library of this interpreter."""

    path: tuple[str, ...] = Field((), description="files, folders or globs of text, JSON, CSV, parquet or Arrow, plain "
                                                  "or compressed")
    dataset: str | None = Field(None, description="name (or local path) for datasets.load_dataset")
    dataset_config: str | None = Field(None, description="its configuration name")
    split: str = Field("train", description="its split")
    streaming: bool = Field(False, description="stream the dataset and stop after max_bytes")
    text_field: str = Field("text", description="field that holds the text in JSON, CSV, parquet, Arrow and datasets; "
                                             "meta.text is one within another")
    max_bytes: int = Field(32_000_000, ge=1, description="text beyond this many bytes is not read")
    tokenizer: str | None = Field(None, description="a tokenizer.json, or a folder that save_pretrained wrote; "
                                                   "null trains a byte-level BPE")
    vocab_size: int = Field(1024, ge=257, description="size of the trained vocabulary")
    length: int = Field(128, ge=2, description="tokens a training sequence")
    documents: Literal["packed", "separate"] = Field(
        "packed", description="a training sequence may hold the end of one document and the beginning of the next. "
                              "packed: all of it is one context; separate: a token sees its own document alone, and "
                              "positions start anew with each, which is better for documents shorter than length")
    heldout: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="share of the documents held out")
    cache_dir: str | None = Field(None, description="token files; null means $LOOPED_CACHE or ~/.cache/looped")

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
