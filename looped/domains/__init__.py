"""The kinds of data as objects: text, puzzles, images to classify, images to make. What a verb or the trainer does
differently for one of them is in its file."""

from looped.config import Config
from looped.domains.base import Domain
from looped.domains.classify import Classify
from looped.domains.generate import Generate
from looped.domains.puzzles import Puzzles
from looped.domains.text import Text
from looped.dotted import class_at

DOMAINS: dict[str, Domain] = {domain.name: domain for domain in (Text(), Puzzles(), Classify(), Generate())}
"""By the name of their `looped.config.kinds.Kind`."""


def domain_of(config: Config) -> Domain:
    """The domain of a config: by its kind, or one's own (`domain.name`). Raises UserError."""
    if config.domain.name is not None:
        return class_at(config.domain.name, "domain.name")()
    return DOMAINS[config.kind.name]
