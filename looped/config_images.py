"""Settings of image data: where images come from, their size, what is held out, and how they are varied."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from looped.config_base import Depth, Section

MAX_MAGNITUDE = 30
"""The top of RandAugment's scale; the published strengths are given on it."""

READS = {"digits": (), "idx": ("path",), "folder": ("path",),
         "dataset": ("dataset", "dataset_config", "test_split")}
"""Source -> the settings without a default that it reads; the first is the one it cannot do without."""

POINTERS = ("path", "dataset", "dataset_config", "test_split")


class ImageConfig(Section):
    """Images with a class each. Without `source` there are none."""

    source: Literal["digits", "idx", "folder", "dataset"] | None = Field(
        None, description="scikit-learn's 8 x 8 digits, MNIST's files, a folder a class, or datasets.load_dataset; "
                          "null: no images")
    path: str | None = Field(None, description="folder of the IDX files (train-images-idx3-ubyte, ..., plain or .gz), "
                                               "or of the class folders, which may lie below train/ and test/")
    dataset: str | None = Field(None, description="name (or local path) for datasets.load_dataset")
    dataset_config: str | None = Field(None, description="its configuration name")
    split: str = Field("train", description="its split to train on")
    test_split: str | None = Field(None, description="its split held out; null: test, where there is one")
    image_field: str = Field("image", description="field that holds the image in datasets")
    label_field: str = Field("label", description="field that holds the class in datasets")
    size: Depth | None = Field(None, description="side of the square that images are made into: shorter side resized, "
                                                 "centre kept; null keeps the size that all of them have")
    heldout: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share of the images held out, where the source has no test part")
    max_train: Annotated[int, Field(ge=1)] | None = Field(
        None, description="images that are trained, of those there are; null: all")
    max_heldout: Annotated[int, Field(ge=1)] | None = Field(
        None, description="images held out that are measured; null: all")
    flip: bool = Field(False, description="mirror half of the training images left to right")
    randaugment: bool = Field(False, description="vary training images by RandAugment")
    randaugment_ops: Depth = Field(2, description="operations an image, drawn anew each time")
    randaugment_magnitude: Annotated[int, Field(ge=0, le=MAX_MAGNITUDE)] = Field(
        9, description=f"strength of the operations, of {MAX_MAGNITUDE}")
    normalise: Literal["standard", "symmetric"] = Field(
        "standard", description="zero mean and unit variance a channel, as measured on the training images; or the "
                                "range [-1, 1]")

    @model_validator(mode="after")
    def _check_source(self):
        if self.source is None:
            self._refuse_pointers(allowed=(), why="nothing reads without images.source")
            return self
        needed = READS[self.source][:1]
        if needed and getattr(self, needed[0]) is None:
            what = {"idx": "the folder of the IDX files", "folder": "the folder of the class folders",
                    "dataset": "a name for datasets.load_dataset, or a local path"}[self.source]
            raise ValueError(f"source {self.source} needs {what}; set images.{needed[0]}")
        self._refuse_pointers(allowed=READS[self.source], why=f"source {self.source} does not read")
        if self.test_split == self.split:
            raise ValueError(f"test_split {self.test_split} is also the split trained on; set images.test_split to "
                             f"another, or to null")
        return self

    def _refuse_pointers(self, allowed: tuple[str, ...], why: str) -> None:
        """A pointer to data that nothing follows is a mistake, not a default."""
        for name in POINTERS:
            value = getattr(self, name)
            if value is not None and name not in allowed:
                readers = " or ".join(source for source, reads in READS.items() if name in reads)
                raise ValueError(f"{name} {value} is set, which {why}; set images.source to {readers}, or "
                                 f"images.{name} to null")
