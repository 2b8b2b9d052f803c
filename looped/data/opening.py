"""What a config trains on: text, or the problems of a task."""

from looped.config import Config
from looped.data.problems import TaskData, prepare_task
from looped.data.text import TextData, prepare

Data = TextData | TaskData


def open_data(config: Config) -> Data:
    """The text or the task of a config. Raises UserError where it cannot be had."""
    return prepare_task(config.task) if config.is_task else prepare(config.data)
