"""Settings of image data: source, size, held-out part, augmentation, and the goal, to classify or to generate."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from looped.config.base import Depth, Fraction, Section

MAX_MAGNITUDE = 30
"""The top of RandAugment's scale; the published strengths are given on it."""

READS = {"digits": (), "idx": ("path",), "folder": ("path",),
         "dataset": ("dataset", "dataset_config", "test_split")}
"""Source -> the settings that it reads and that have no default; the first one is required."""

POINTERS = ("path", "dataset", "dataset_config", "test_split")


class ImageConfig(Section):
    """Images with one class each; none if `source` is null."""

    source: Literal["digits", "idx", "folder", "dataset"] | None = Field(
        default=None,
        description="scikit-learn's 8 x 8 digits, MNIST's files, one folder per class, or datasets.load_dataset; null: "
                    "no images")
    goal: Literal["classify", "generate"] = Field(
        default="classify",
        description="predict the class of an image; or, under denoise and blockwise, generate images of a class from "
                    "noise")
    path: str | None = Field(
        default=None,
        description="folder of the IDX files (train-images-idx3-ubyte, ..., plain or .gz), or of the class folders, "
                    "which may lie below train/ and test/")
    dataset: str | None = Field(default=None, description="name (or local path) for datasets.load_dataset")
    dataset_config: str | None = Field(default=None, description="configuration name of the dataset")
    split: str = Field(default="train", description="training split of the dataset")
    test_split: str | None = Field(
        default=None, description="held-out split of the dataset; null: test, if there is one")
    image_field: str = Field(default="image", description="field that holds the image in datasets")
    label_field: str = Field(default="label", description="field that holds the class in datasets")
    size: Depth | None = Field(
        default=None,
        description="side of the square images: shorter side resized, centre cropped; null keeps the size that all of "
                    "them have")
    heldout: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="fraction of the images held out, if the source has no test part")
    max_train: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="largest number of training images; null: all")
    max_heldout: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="largest number of held-out images in an evaluation; null: all")
    flip: bool = Field(default=False, description="mirror half of the training images left to right")
    randaugment: bool = Field(default=False, description="augment training images by RandAugment")
    randaugment_ops: Depth = Field(default=2, description="operations per image, redrawn each time")
    randaugment_magnitude: Annotated[int, Field(ge=0, le=MAX_MAGNITUDE)] = Field(
        default=9,
        description=f"strength of the operations, out of {MAX_MAGNITUDE}")
    normalise: Literal["standard", "symmetric"] = Field(
        default="standard",
        description="zero mean and unit variance per channel, as measured on the training images; or the range [-1, 1]")
    label_dropout: Fraction = Field(
        default=0.1,
        description="fraction of the training images whose class is hidden under goal generate, for guidance")

    @model_validator(mode="after")
    def _check_source(self):
        if self.source is None:
            self._refuse_pointers(allowed=(), why="nothing reads without images.source")
            if self.goal == "generate":
                raise ValueError("goal generate has no images to learn from; set images.source, or images.goal to "
                                 "classify")
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
        """Raises ValueError for a setting that locates data and that the source does not read."""
        for name in POINTERS:
            value = getattr(self, name)
            if value is not None and name not in allowed:
                readers = " or ".join(source for source, reads in READS.items() if name in reads)
                raise ValueError(f"{name} {value} is set, which {why}; set images.source to {readers}, or "
                                 f"images.{name} to null")


GENERATOR_NEEDS: dict[str, tuple[Any, str]] = {
    "model.num_prelude_layers": (0, "all layers of a generator are in its core, where the noise level reaches them"),
    "model.num_coda_layers": (0, "all layers of a generator are in its core, where the noise level reaches them"),
    "model.injection": ("none", "the class conditions each layer, and there is no other input to inject"),
    "denoise.train_steps": (1, "pixels are denoised one step at a time"),
    "denoise.carry": ("none", "a step predicts nothing but the clean pixels"),
    "denoise.evidence_in": (False, "pixels have no token embedding that could be inferred from the noisy ones"),
    "denoise.noise.distribution": (("log-normal", "log-uniform"), "adaptive levels follow a cross-entropy"),
    "denoise.context_dropout": (0.0, "there is no image to hide, and images.label_dropout hides classes"),
    "denoise.start": ("noise", "zero would give one image per class"),
    "blocks.shared": (("trained", "with-block"), "the output projection to pixels starts at zero and would stay zero"),
}
"""Setting -> (value that image generation needs, or the allowed ones with the default first; reason)."""
