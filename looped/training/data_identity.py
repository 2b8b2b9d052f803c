"""Identity of a run's training data: saved in its folder as data.json, and compared with data that are opened later.

    data.json  {"fingerprint": ..., "given": ..., "facts": {...}}

`fingerprint` is also in the state of each checkpoint, which takes precedence: runs without a data.json have it there.
`given`: the data were passed to `train` in Python, so the config does not lead to them. `facts` describe the data, to
report what changed.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from looped.atomic_files import of_run, write_text
from looped.config import Config
from looped.data.eval_text import HeldoutText
from looped.data.from_config import Data, Found, Seen, cached_data, find_data
from looped.data.image_batches import ImageSpec
from looped.data.images import Normalizer
from looped.data.tokenizer import TextTokenizer
from looped.errors import UserError
from looped.training.checkpoint import list_checkpoints

DATA = "data.json"

OTHERS = "allow other data with --other-data (other_data=True in Python)"
MEASURE = f"bring the old data back, or {OTHERS}"
"""The fixes offered if a trained run meets other data."""


@dataclass(frozen=True)
class Identity:
    """The data that a run was trained on, as far as recorded, and the sizes that its model expects: `vocab_size` tokens
    or classes, and the `picture` size of images. An imported model has no fingerprint: any data of these sizes match.
    """

    fingerprint: str | None
    vocab_size: int
    picture: ImageSpec | None = None
    given: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def change(self, data: "Identified", then: str = "then", now: str = "now") -> str | None:
        """Description of how other data differ; None if they are the same, or if no fingerprint is recorded."""
        if self.fingerprint is None:
            return None
        changed = [f"{name} {_short(self.facts[name])} {then}, {_short(value)} {now}"
                   for name, value in data.facts.items() if self.facts.get(name, value) != value and name != "source"]
        if data.fingerprint == self.fingerprint and not changed:
            return None
        sources = [_short(facts["source"]) for facts in (self.facts, data.facts) if "source" in facts]
        where = f"{sources[0]} {then}, {sources[1]} {now}" if len(set(sources)) > 1 else "".join(sources[:1])
        known = self.facts.get("contents") == data.facts.get("contents", "") and not changed
        what = "the settings differ" if known else "the contents differ"
        return "; ".join(filter(None, [where, ", ".join(changed[:3]) or what]))

    def matches(self, data: "Identified") -> bool:
        """True if the data are known to be those of training."""
        return self.fingerprint is not None and self.change(data) is None

    def change_of_contents(self, other: "Identity") -> str | None:
        """Description of how the training data of another run differ; None if they are the same. Augmentation and
        normalisation of images do not count as a difference if both runs recorded the contents."""
        if "images" in self.facts and "images" in other.facts:
            same = self.facts["contents"] == other.facts["contents"]
            return None if same else self.change(other, "here", "there")
        return self.change(other, "here", "there")

    def check(self, data: "Identified", run: str | Path, way_out: str = MEASURE) -> None:
        """Raises UserError, with the fix, if these are not the data that the run was trained on."""
        change = self.change(data)
        if change is None:
            return
        if self.given:
            raise self.lost(run, f"its config leads to other data ({change})")
        raise UserError(f"the data of run {run} have changed since it was trained on them ({change}); {way_out}")

    def lost(self, run: str | Path, why: str) -> UserError:
        """The error for data that the config does not lead to."""
        return UserError(f"run {run} was trained on data given in Python, and {why}; pass them again (data=... of "
                         f"load_run and train), or {OTHERS}")

    def check_numbers(self, data: Data | HeldoutText, run: str | Path, tokenizer: TextTokenizer | None) -> None:
        """Raises UserError if the tokens, classes or patches of the data do not match the run's model."""
        if tokenizer is not None and data.tokenizer.json() != tokenizer.json():
            raise UserError(f"the data to evaluate run {run} on have another tokenizer than the run; make them with "
                            f"heldout_text(texts, run.tokenizer)")
        if data.vocab_size != self.vocab_size:
            raise UserError(f"run {run} has {self.vocab_size} symbols and these data have {data.vocab_size}; evaluate "
                            f"it on data of the same kind")
        shapes = [picture and (picture.channels, picture.height, picture.width, picture.patch)
                  for picture in (self.picture, data.picture)]
        if shapes[0] != shapes[1]:
            raise UserError(f"run {run} expects images of (channels, height, width, patch) {shapes[0]} and these are "
                            f"{shapes[1]}; evaluate it on images of the same size")

    @property
    def scale(self) -> Normalizer | None:
        """The normalisation of its images, if recorded."""
        if "means" not in self.facts:
            return None
        return Normalizer(tuple(self.facts["means"]), tuple(self.facts["deviations"]))


def remember_data(run: Path, data: "Identified", *, given: bool) -> None:
    """Save the identity of the data in the folder of a new run; a resumed run has passed `Identity.check`.

    Raises UserError if writing fails."""
    if not (run / DATA).exists() or not list_checkpoints(run):
        found = {"fingerprint": data.fingerprint, "given": given, "facts": dict(data.facts)}
        with of_run(run / DATA):
            write_text(run / DATA, json.dumps(found, indent=1))


def recall_data(run: Path, state: Mapping[str, Any]) -> Identity:
    """The identity of a run's training data, from its folder and the state of a checkpoint."""
    picture = ImageSpec(**state["picture"]) if state.get("picture") else None
    bare = Identity(state["data"], state["vocab_size"], picture)
    try:
        found = json.loads((run / DATA).read_text(encoding="utf-8"))
        if found["fingerprint"] != bare.fingerprint:
            return bare
        return Identity(bare.fingerprint, bare.vocab_size, picture, bool(found["given"]), dict(found["facts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return bare


def open_own(run: Path, config: Config, *, trained: Config, identity: Identity, tokenizer: TextTokenizer | None,
             other_data: bool) -> Data:
    """Open the data of a run with its own tokenizer and normalisation: those of its training config `trained`, with the
    evaluation settings of `config`. The paths of both are resolved (`located`).

    Raises UserError if the data have changed, unless `other_data`.
    """
    try:
        found = find_data(trained)
    except UserError as error:  # moved, deleted, or out of reach
        if identity.given:
            raise identity.lost(run, f"its config leads to no data ({error})") from None
        text = tokenizer and cached_data(trained, identity.fingerprint, tokenizer, identity.facts)
        if not text or other_data:
            raise
        print(f"the text of run {run} is not available; its tokens from the cache are used", file=sys.stderr)
        return text
    if not other_data:
        identity.check(found, run)
    if config.images != trained.images:  # fewer held-out images
        found = find_data(config)
    data = found.open(Seen(tokenizer, _scale_for(found, run, trained, identity)))
    if other_data:
        identity.check_numbers(data, run, tokenizer)
    elif config.images == trained.images:
        identity.check(data, run)
    return data


def _scale_for(found: Found, run: Path, config: Config, identity: Identity) -> Normalizer | None:
    """The normalisation of the training images. Raises UserError if other images need it and it is not recorded."""
    measured = "images.normalise" in config.kind.reads and config.images.normalise == "standard"
    if measured and identity.scale is None and found.fingerprint != identity.fingerprint:
        raise UserError(f"run {run} has no record of the means and deviations of its images, which other images need "
                        f"for normalisation; bring the old images back")
    return identity.scale


Identified = Data | HeldoutText | Found | Identity
"""Data that are open, found but not yet open, or recorded; all have `fingerprint` and `facts`."""


def label_of(data: "Identified") -> str:
    """A short, unique name for data."""
    return f"{data.facts['source']} ({data.fingerprint[:8]})"


def _short(value: Any) -> str:
    """A value as text of at most 60 characters."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
