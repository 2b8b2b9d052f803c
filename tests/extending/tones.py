"""A kind of data in one file: short sounds, whose wave is to be named.

A sound is so many frames of numbers; all frames are given, and the row before them is to say which of four waves it is.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from looped.config.data_kinds import ANSWERED, Kind
from looped.data.batch import Batch
from looped.data.from_config import Found
from looped.domains.image_classification import Classify
from looped.inference.rollout import answer
from looped.models.language import LanguageModel
from looped.nn.blocks import run_layers
from looped.nn.rows import PLAIN

WAVES = {"sine": lambda turns: np.sin(2 * np.pi * turns), "square": lambda turns: np.sign(np.sin(2 * np.pi * turns)),
         "saw": lambda turns: 2 * (turns % 1) - 1, "triangle": lambda turns: 4 * np.abs(turns % 1 - 0.5) - 1}
NUM_FRAMES, NUM_HELDOUT = 16, 64


@dataclass(frozen=True)
class Sounds:
    """Sounds in an order that is a function of (seed, step), and others to measure on."""

    frame: int
    noise: float

    train = property(lambda self: self)
    vocab_size, tokenizer, picture, end_of_text = len(WAVES), None, None, None

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.frame, self.noise, NUM_FRAMES)).encode()).hexdigest()[:32]

    @property
    def facts(self) -> dict:
        return {"source": "tones", "frame": self.frame, "noise": self.noise, "contents": self.fingerprint[:16]}

    @property
    def summary(self) -> str:
        return f"tones: {', '.join(WAVES)}, {NUM_FRAMES} frames of {self.frame}"

    def batch(self, step, *, batch_size, seed, rows=None):
        return self.ask([(seed, step * batch_size + row) for row in (range(batch_size) if rows is None else rows)])

    def heldout(self, batch_size):
        for first in range(0, NUM_HELDOUT, batch_size):
            yield self.ask([(-1, first + row) for row in range(min(batch_size, NUM_HELDOUT - first))])

    def describe(self, step, *, batch_size, seed, rows):
        return [f"row {row}: sound {step * batch_size + row} of seed {seed}" for row in rows]

    def ask(self, numbers) -> Batch:
        """Sounds by their numbers, as the question for their waves."""
        sounds, waves = zip(*(self._sound(*number) for number in numbers), strict=True)
        targets = torch.zeros(len(waves), 1 + NUM_FRAMES, dtype=torch.long)
        targets[:, 0] = torch.tensor(waves)
        scored = torch.zeros_like(targets, dtype=torch.bool)
        scored[:, 0] = True
        return Batch(torch.from_numpy(np.stack(sounds)), targets, scored, causal=False)

    def _sound(self, seed, number):
        random = np.random.default_rng([seed + 1, number])
        wave, pitch, phase = int(random.integers(len(WAVES))), random.uniform(2, 8), random.uniform()
        turns = phase + pitch * np.arange(NUM_FRAMES * self.frame) / (NUM_FRAMES * self.frame)
        sound = list(WAVES.values())[wave](turns) + self.noise * random.standard_normal(len(turns))
        return sound.reshape(NUM_FRAMES, self.frame).astype(np.float32), wave


class ToneModel(LanguageModel):
    """A looped classifier of sounds: `encode` takes frames, the row of the wave before them."""

    @classmethod
    def of_data(cls, config, vocab_size, picture, structure):
        return cls(config.model, vocab_size, config.domain.options["frame"], structure)

    def __init__(self, config, vocab_size, frame, structure):
        super().__init__(config, vocab_size, structure)
        self.frames, self.wave_row = nn.Linear(frame, config.width), nn.Parameter(torch.zeros(config.width))

    def encode(self, tokens, rows=PLAIN):
        frames = self.frames(tokens)
        x = torch.cat([self.wave_row.expand(len(frames), 1, -1).to(frames.dtype), frames], dim=1)
        return run_layers(self.prelude, x, None, self.placed(x, rows).at("prelude"))


class Tones(Classify):
    """Sounds to name; what is measured is what `Classify` measures of images."""

    name, examples = "tones", "sounds"
    kind = Kind("tones", "sounds", lambda config: f"domain.name {config.domain.name}",
                ("evaluation.num_samples", *ANSWERED), lambda config: True, because="all frames see each other",
                model="tones.ToneModel", like="classify")

    def find(self, config):
        sounds = Sounds(**config.domain.options)
        return Found(sounds.fingerprint, sounds.facts, lambda seen: sounds)

    def does(self, config):
        return "names sounds"

    def preview(self, objective, data, config, workers):
        batch, names = next(iter(data.heldout(config.evaluation.num_samples))), list(WAVES)
        depth = max(config.evaluation.sample_depths)
        named = answer(objective, batch, [depth], config)[depth].answers[:, 0].tolist()
        return "\n".join(f"{names[wave]} taken for {names[said]}" for wave, said in
                         zip(batch.targets[:, 0].tolist(), named, strict=True))
