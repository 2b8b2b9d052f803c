"""Text from several sources with weights (`data.mixture`): found, tokenized by one tokenizer, and opened as one.

Each source is a text of its own, with its own manifest, split and token files (`looped.data.text`), and is named in
every message. A tokenizer that is trained sees all sources in proportion to their weights.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

from looped.atomic_files import lock_for, write_text
from looped.config.data import DataConfig
from looped.data.corpus import source_of
from looped.data.documents import pieces_of
from looped.data.mixed_stream import MixedStream
from looped.data.progress import progress
from looped.data.shared_files import check_sides, common_names
from looped.data.text import (
    FoundText,
    TextData,
    cache_root,
    cached_text,
    find_text,
    known_text,
    usable_cache,
    warn_of_size,
)
from looped.data.text_sources import Source
from looped.data.token_cache import TOKENIZER, fault, kept_tokenizer, open_folder
from looped.data.tokenizer import TextTokenizer, train_tokenizer
from looped.errors import UserError

CHUNK = 1 << 12
"""Characters that a tokenizer's training takes or leaves at once."""


@dataclass(frozen=True)
class MixedText(TextData):
    """The text of a mixture: `parts` by the names of their sources, and their `shares` of the training sequences.

    bytes_per_token: the mean by the shares. epochs: of each source in the run, if its length is known.
    """

    parts: Mapping[str, TextData] = field(default_factory=dict)
    shares: Mapping[str, Fraction] = field(default_factory=dict)
    epochs: Mapping[str, float] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        each = {name: part.facts for name, part in self.parts.items()}
        return {"source": self.source, **_facts({name: (part.fingerprint, each[name])
                                                 for name, part in self.parts.items()}),
                **{f"{fact} of {name}": facts[fact] for name, facts in each.items() for fact in OF_EACH},
                "tokens": len(self.train) + len(self.heldout), "held-out tokens": len(self.heldout),
                "vocabulary": self.vocab_size, "bytes/token": self.bytes_per_token,
                "contents": _digest({name: facts["contents"] for name, facts in each.items()})[:16]}

    def by_source(self, num: int, figures: Callable[[TextData, int], dict[str, float]]) -> dict[str, float]:
        """Figures of `num` held-out sequences: their means by the shares, then those of each source, as `loss/web`."""
        counts = self.heldout.allotted(num)
        each = {name: figures(part, max(counts[name], 1)) for name, part in self.parts.items()}
        means = {metric: sum(float(self.shares[name]) * found[metric] for name, found in each.items())
                 for metric in next(iter(each.values()))}
        return means | {f"{metric}/{name}": value for name, found in each.items() for metric, value in found.items()}

    @property
    def summary(self) -> str:
        """Lines for logs: the whole, then each source."""
        lines = [f"mixture of {len(self.parts)}: {len(self.train):,} training tokens, {len(self.heldout):,} held-out, "
                 f"vocabulary {self.vocab_size:,}, {self.bytes_per_token:.3f} bytes/token"]
        for name, part in self.parts.items():
            lines.append(f"  {float(self.shares[name]):.4g} {name}, {part.counted}"
                         + (f"; {self.epochs[name]:.3g} epochs in the run" if name in self.epochs else ""))
        return "\n".join(lines)


OF_EACH = ("tokens", "held-out tokens", "bytes/token")
"""The facts about the tokens of each source."""


@dataclass(frozen=True)
class FoundMixture:
    """The texts of a mixture, whose fingerprints are known. num_sequences: of the training run; None: not known."""

    data: DataConfig
    parts: Mapping[str, FoundText]
    num_sequences: int | None

    @property
    def fingerprint(self) -> str:
        """The hash of the names, shares and fingerprints of all sources."""
        return _digest({name: [str(share), self.parts[name].fingerprint] for name, share in self.data.shares.items()})

    @property
    def facts(self) -> dict[str, Any]:
        """The entries of `MixedText.facts` that need no tokens."""
        return {"source": _source(self.data.shares, {name: part.source for name, part in self.parts.items()}),
                **_facts({name: (part.fingerprint, part.facts) for name, part in self.parts.items()})}

    def open(self, tokenizer: TextTokenizer | None = None) -> MixedText:
        """The text tokenized by `tokenizer`, by default that of the settings, loaded or trained. Raises `UserError`."""
        encoder, parts = self._encoder(tokenizer), {}
        for name, part in self.parts.items():
            with told_of(name):
                parts[name] = part.open(encoder)
        return _mixed(self.data, self.fingerprint, parts, self.num_sequences)

    def prepare(self) -> str:
        """Tokenizes the text, unless that has been done, and says what is there. Raises `UserError`."""
        encoder, lines = self._encoder(None), []
        for name, part in self.parts.items():
            with told_of(name):
                lines.append(f"{name}: {part.prepare(encoder)}")
        return "\n".join([*lines, self.open().summary])

    def _encoder(self, tokenizer: TextTokenizer | None) -> TextTokenizer | None:
        """The tokenizer of all sources; None: each of them loads `data.tokenizer`."""
        if tokenizer is not None or self.data.tokenizer:
            return tokenizer
        with usable_cache(self.data):
            encoder = self._trained(cache_root(self.data) / self.fingerprint)
        warn_of_size(self.data, encoder)
        return encoder

    def _trained(self, folder: Path) -> TextTokenizer:
        """The tokenizer in a folder, where it is left after it is trained; of several processes one trains it. Nothing
        is written to a folder that has it."""
        if (encoder := kept_tokenizer(folder)) is not None:
            return encoder
        folder.mkdir(parents=True, exist_ok=True)
        with lock_for(folder.with_name(f".{folder.name}.lock")):
            if (encoder := kept_tokenizer(folder)) is None:
                total = sum(part.num_bytes for part in self.parts.values())
                with progress("training the tokenizer", total) as advance:
                    pieces = chain.from_iterable(
                        in_proportion(part.training_pieces(advance), float(share * total / part.num_bytes))
                        for part, share in zip(self.parts.values(), self.data.shares.values(), strict=True))
                    encoder = train_tokenizer(pieces, self.data.vocab_size)
                write_text(folder / TOKENIZER, encoder.json())
            return encoder


def find_mixture(data: DataConfig, num_sequences: int | None = None) -> FoundMixture:
    """The texts of `data.mixture`, each known by its manifest or read now. Raises `UserError`, which names the
    source."""
    parts = {}
    for name, source in sources_of(data).items():
        with told_of(name):
            parts[name] = find_text(data.of_source(name), source)
    check_sides(parts)
    return FoundMixture(data, parts, num_sequences)


def sources_of(data: DataConfig) -> dict[str, Source]:
    """The sources of `data.mixture`; a file that several of them hold has one name in all. Raises `UserError`."""
    found = {}
    for name in data.shares:
        with told_of(name):
            found[name] = source_of(data.of_source(name), cache_root(data))
    names = common_names(found.values())
    return {name: source.renamed(names) for name, source in found.items()} if names else found


def cached_mixture(data: DataConfig, fingerprint: str, tokenizer: TextTokenizer, facts: Mapping[str, Any]
                   ) -> MixedText | None:
    """A mixture that is no longer available, from the token cache, as `cached_text` for one source."""
    parts = {}
    for name in data.shares:
        part = {"source": name} | {fact: facts[f"{fact} of {name}"] for fact in OF_EACH if f"{fact} of {name}" in facts}
        parts[name] = cached_text(data.of_source(name), str(facts.get(f"fingerprint of {name}")), tokenizer, part)
    return None if None in parts.values() else _mixed(data, fingerprint, parts, None)


def _mixed(data: DataConfig, fingerprint: str, parts: Mapping[str, TextData], num_sequences: int | None) -> MixedText:
    shares, tokenizer = data.shares, next(iter(parts.values())).tokenizer
    train, heldout = (MixedStream(side, {name: getattr(part, attribute) for name, part in parts.items()}, shares)
                      for side, attribute in (("train", "train"), ("held-out", "heldout")))
    windows = {name: part.train.windows(data.length) for name, part in parts.items()}
    epochs = {} if num_sequences is None else epochs_of(shares, windows, num_sequences)
    return MixedText(train, heldout, tokenizer, tokenizer.vocab_size,
                     sum(float(share) * parts[name].bytes_per_token for name, share in shares.items()), fingerprint,
                     _source(shares, {name: part.source for name, part in parts.items()}),
                     parts=parts, shares=shares, epochs=epochs)


def shares_said(data: DataConfig, num_sequences: int | None) -> list[str]:
    """Lines about the sources of a mixture: their shares, and their sequences and epochs in a run, as far as these are
    known without reading text."""
    windows, lines = _known_windows(data), []
    for name, share in data.shares.items():
        line = f"{float(share):.4g} {name}"
        if num_sequences is not None:
            line += f": {float(share * num_sequences):,.0f} sequences"
            line += f", {epochs_of({name: share}, windows, num_sequences)[name]:.3g} epochs" if name in windows else ""
        lines.append(line)
    return [f"mixture, in parts of the training sequences: {'; '.join(lines)}"] if lines else []


def _known_windows(data: DataConfig) -> dict[str, int]:
    """The number of training windows of each source; empty unless all sources have been tokenized."""
    try:
        parts = {name: known_text(data.of_source(name), source) for name, source in sources_of(data).items()}
    except UserError:  # training says it, with the source's name
        return {}
    if None in parts.values():
        return {}
    encoder = kept_tokenizer(cache_root(data) / FoundMixture(data, parts, None).fingerprint)
    folders = {name: part.folder(encoder) for name, part in parts.items()}
    if any(fault(folder) for folder in folders.values()):
        return {}
    return {name: (len(open_folder(folder).tokens[0]) - 1) // data.length for name, folder in folders.items()}


def epochs_of(shares: Mapping[str, Fraction], windows: Mapping[str, int], num_sequences: int) -> dict[str, float]:
    """Epochs of each source in a run of `num_sequences`."""
    return {name: float(share * num_sequences / windows[name]) for name, share in shares.items()}


def in_proportion(pieces: Iterable[str], ratio: float) -> Iterator[str]:
    """Pieces of text, evenly taken from, or repeated, so that their characters are `ratio` times those given; the first
    is always among them."""
    owed = 0.0
    for piece in chain.from_iterable(pieces_of([piece], CHUNK) for piece in pieces):
        owed += ratio * len(piece)
        while owed > 0:
            yield piece
            owed -= len(piece)


def _source(shares: Mapping[str, Fraction], sources: Mapping[str, str]) -> str:
    return ", ".join(f"{float(share):.4g} {name} ({sources[name]})" for name, share in shares.items())


def _facts(parts: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The facts that need no tokens, of (fingerprint, facts) by source: first those that name a source, so that a
    change is reported with its name."""
    counts = ("documents", "held-out documents")
    return {**{f"{fact} of {name}": value for name, (fingerprint, facts) in parts.items()
               for fact, value in (*((count, facts[count]) for count in counts), ("fingerprint", fingerprint))},
            **{count: sum(facts[count] for _, facts in parts.values()) for count in counts}}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


OF_SOURCE = re.compile(r"\bdata\.(path|dataset_config|dataset|split|text_field|max_bytes)\b")


@contextmanager
def told_of(name: str) -> Iterator[None]:
    """Names the settings of a source of the mixture in the errors and warnings of the block."""
    def named(message: Any) -> str:
        said, times = OF_SOURCE.subn(rf"data.mixture.{name}.\1", str(message))
        return said if times else f"data.mixture.{name}: {said}"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except UserError as error:
            raise UserError(named(error)) from None
    for each in caught:
        warnings.warn(named(each.message) if each.category is UserWarning else each.message, each.category,
                      stacklevel=4)
