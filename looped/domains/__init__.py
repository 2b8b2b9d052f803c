"""One class per kind of data: text, puzzles, images to classify, images to generate. Each file holds what commands and
the trainer do differently for that kind."""

from looped.config import Config
from looped.domains.base import Domain
from looped.domains.image_classification import Classify
from looped.domains.image_generation import Generate
from looped.domains.puzzles import Puzzles
from looped.domains.text import Text
from looped.import_path import class_at

DOMAINS: dict[str, Domain] = {domain.name: domain for domain in (Text(), Puzzles(), Classify(), Generate())}
"""Name of a `looped.config.data_kinds.Kind` -> its domain."""


def domain_of(config: Config) -> Domain:
    """The domain of a config: that of its kind, or a custom one (`domain.name`). Raises UserError."""
    if config.domain.name is not None:
        return class_at(config.domain.name, "domain.name")()
    return DOMAINS[config.kind.name]
