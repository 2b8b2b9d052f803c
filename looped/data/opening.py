"""What a config trains on: text, the problems of a task, or labelled images."""

from looped.config import Config
from looped.data.labelled import LabelledData, prepare_labelled
from looped.data.problems import TaskData, prepare_task
from looped.data.text import TextData, prepare

Data = TextData | TaskData | LabelledData


def open_data(config: Config) -> Data:
    """The text, the task or the images of a config. Raises UserError where they cannot be had."""
    if config.is_images:
        return prepare_labelled(config.images, config.model.patch_size)
    return prepare_task(config.task) if config.is_task else prepare(config.data)
