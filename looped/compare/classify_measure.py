"""Measurement of runs that classify images: which held-out images are classified correctly, by depth."""

from typing import Any, ClassVar

from looped.compare.accuracy_measure import ShareMeasured, ShareMeasurer, as_json
from looped.compare.curve import Metric
from looped.compare.measure import Measurer
from looped.compare.plan import AGAIN, Plan, RunSpec
from looped.data.image_batches import LabelledData, cut
from looped.data.images import ImageData, prepare_images
from looped.devices import CPU, Placement
from looped.errors import UserError
from looped.evaluation.accuracy import classify
from looped.evaluation.plots import AXES
from looped.training.runs import Run

ACCURACY = Metric("accuracy", "accuracy", "", AXES["accuracy"], higher_is_better=True, worst=0.0, examples="images",
                 is_share=True)


class ImageMeasured(ShareMeasured):
    """One run on images."""

    gauge = ACCURACY


class OfImages(Measurer):
    """Gives every arm and seed the same images, cut into patches of the arm's own size."""

    def __init__(self, plan: Plan, finished: list[RunSpec], placement: Placement = CPU):
        super().__init__(plan, finished, placement)
        self.images: ImageData = prepare_images(plan.config.images)

    def inputs(self, place: RunSpec) -> dict[str, Any]:
        return super().inputs(place) | {"images": self.images.fingerprint}

    def opened(self, place: RunSpec) -> tuple[Run, LabelledData]:
        """A run, and the images in its patch size. Raises UserError if it was trained on other images."""
        run = self.load(place)
        data = cut(self.images, run.config.model.patch_size)
        run.identity.check(data, run.path, AGAIN)
        return run, data


class ImageMeasurer(OfImages, ShareMeasurer):
    """Counts the images that are classified correctly."""

    measured: ClassVar[type[ImageMeasured]] = ImageMeasured

    def evaluate(self, place: RunSpec) -> dict[str, Any]:
        run, data = self.opened(place)
        found = classify(run.objective, data, run.config, self.depths(place))
        return as_json(found.rows, {None: found.right})


def check_images(plan: Plan) -> None:
    """Raises UserError if the images are not available, do not split into an arm's patches, or too few are held out.
    """
    images = prepare_images(plan.config.images)
    for arm in plan.arms:
        cut(images, arm.config.model.patch_size)
    if len(images.heldout) < 2:
        raise UserError(f"{images.source} has one held-out image, but a comparison chooses depths on one half and "
                        f"reports the other; hold out more, by images.heldout if the data has no test split")
