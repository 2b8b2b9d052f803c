"""The kinds of data (text, tasks, images): the settings that each reads, and what it is compatible with.

A config has one kind (`Config.kind`): text, unless `task.name`, `images.source` or `domain.name` is set. A custom kind
is the `kind` of a subclass of `looped.domains.Domain`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from looped.config.data import DataConfig, TaskConfig
from looped.config.images import GENERATOR_NEEDS, ImageConfig
from looped.errors import UserError
from looped.import_path import class_at

READ_OF_IMAGES = ("model.patch_size", *(f"images.{name}" for name in ImageConfig.model_fields if name != "source"))
ANSWERED = ("evaluation.trajectories", "evaluation.choose", "evaluation.state_noise")
"""Settings read by the kinds that predict answers or classes."""


def nothing(config: Any) -> None:
    """A check that accepts every config."""


@dataclass(frozen=True)
class Kind:
    """A kind of data.

    noun: the data in a message. source: the settings that select the kind in a config, as `task.name sudoku`. reads:
    the kind-specific settings that it reads. sees_all: every row attends to every other; because: the reason, as
    a clause. drops_context: the model can predict without its condition, as guidance needs; hidden: the setting that
    hides the condition in training, and the condition's name. writes: text that a model can continue token by token;
    writes_blocks: tokens can be predicted in blocks. settles_cells: cells can be fixed one after another.
    names_classes: the model predicts classes of images. meets_again: every epoch has the same sequences. model: dotted
    path of the model's class. like: the kind whose training rules this one shares. metric: the main evaluation metric
    by depth. check: rejects configs that do not fit. auto: the settings that `objective auto` stands for, if any.
    """

    name: str
    noun: str
    source: Callable[[Any], str]
    reads: tuple[str, ...]
    sees_all: Callable[[Any], bool]
    because: str = ""
    drops_context: bool = False
    hidden: tuple[str, str] = ("denoise.context_dropout", "the image")
    writes: bool = False
    writes_blocks: bool = False
    settles_cells: bool = False
    names_classes: bool = False
    meets_again: bool = False
    model: str = "looped.models.language.LanguageModel"
    like: str = ""
    metric: str = "accuracy"
    check: Callable[[Any], None] = nothing
    auto: Mapping[str, Any] = field(default_factory=dict, hash=False)


def _check_generator(config: Any) -> None:
    """Raises ValueError for settings that do not fit image generation."""
    if "generate" not in config.rule.kinds:
        raise ValueError(f"images.goal generate is trained by denoising, and objective is {config.objective}; set "
                         f"objective to denoise or blockwise, or images.goal to classify")
    for name, (wanted, why) in GENERATOR_NEEDS.items():
        value, allowed = config.value(name), wanted if isinstance(wanted, tuple) else (wanted,)
        if value not in allowed:
            raise ValueError(f"{name} {value} does not fit images.goal generate: {why}; set it to {allowed[0]}")


IN_AN_IMAGE = "in an image all rows attend to each other"

TEXT = Kind("text", "text", lambda config: "text (no task.name, no images.source)",
            (*(f"data.{name}" for name in DataConfig.model_fields), "evaluation.num_sequences",
             "evaluation.sample_length", "evaluation.prompt_length", "evaluation.num_samples",
             "model.padded_vocab_size"),
            lambda config: False, writes=True, writes_blocks=True, meets_again=True, metric="nats_per_token",
            # two steps after three tenths of the training; docs/when-depth-pays.md
            auto={"objective": "full", "recurrence.mean": 2, "recurrence.from_share": 0.3, "model.state_init": "zero"})
PUZZLES = Kind("puzzles", "a task", lambda config: f"task.name {config.task.name}",
               (*(f"task.{name}" for name in TaskConfig.model_fields if name != "name"), "evaluation.difficulties",
                "evaluation.num_problems", "model.padded_vocab_size", *ANSWERED),
               lambda config: config.task.layout == "full",
               because="under task.layout full all cells are predicted together", settles_cells=True, metric="solved",
               # the most confident cells first; docs/depth.md
               auto={"objective": "denoise", "denoise.context": "inject", "denoise.order": "confidence",
                     "denoise.bridge": "hard", "denoise.noise.distribution": "log-uniform",
                     "denoise.noise.sigma_min": 0.3, "denoise.noise.sigma_max": 10.0,
                     "denoise.noise.share_at_max": 1.0})
CLASSIFY = Kind("classify", "images", lambda config: f"images.source {config.images.source}",
                (*READ_OF_IMAGES, "evaluation.num_samples", *ANSWERED), lambda config: True, because=IN_AN_IMAGE,
                drops_context=True, names_classes=True, model="looped.models.vision.ImageClassifier")
GENERATE = Kind("generate", "images", lambda config: f"images.source {config.images.source}",
                (*READ_OF_IMAGES, "evaluation.num_samples", *ANSWERED), lambda config: True, because=IN_AN_IMAGE,
                drops_context=True, hidden=("images.label_dropout", "its class"),
                model="looped.models.image_denoiser.ImageDenoiser", check=_check_generator,
                metric="frechet_distance")

KINDS = {kind.name: replace(kind, like=kind.name) for kind in (TEXT, PUZZLES, CLASSIFY, GENERATE)}


def kind_of(config: Any) -> Kind:
    """The kind of a config. Raises UserError for a dotted path without a kind."""
    if config.domain.name is not None:
        return own_kind(config.domain.name)
    if config.images.goal == GENERATE.name:
        return KINDS["generate"]
    if config.images.source is not None:
        return KINDS["classify"]
    return KINDS["text" if config.task.name is None else "puzzles"]


@lru_cache
def own_kind(path: str) -> Kind:
    """The kind of the domain at a dotted path. Raises UserError."""
    kind = getattr(class_at(path, "domain.name"), "kind", None)
    if not isinstance(kind, Kind):
        raise UserError(f"domain.name {path} has no kind; give the dotted path of a subclass of looped.domains.Domain "
                        f"whose `kind` is a looped.config.data_kinds.Kind")
    return replace(kind, like=kind.like or kind.name, reads=(*kind.reads, "domain.options"))
