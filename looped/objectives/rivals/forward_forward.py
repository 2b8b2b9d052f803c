"""Forward-Forward: each layer learns by itself to be active where an image carries its right class, and not otherwise.

    loss = mean over layers of [ softplus(theta - g(x, y)) + softplus(g(x, not y) - theta) ] / 2

with the goodness g of a layer the mean (or sum) of its squared activities, in the row that the class stands in or in
all rows. What a layer passes on is normalised, so that the next cannot read the goodness off its length, and carries no
gradient. A class is named by the goodness that the layers beyond the first find in it together. Hinton 2022 (arXiv
2212.13345), sections 2 and 3.3.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from looped.config import Config
from looped.config.rivals import ForwardForwardConfig
from looped.data.batch import Batch
from looped.diffusion.bridge import draw
from looped.models.language import LanguageModel, State
from looped.nn.layers import TransformerLayer
from looped.nn.rows import Rows
from looped.objectives.base import EVERYBODY, Classifier, Loss, Objective, rows_of_batch
from looped.rng import StepRandom

Labels = Int[Tensor, "batch"]
Goodness = Float[Tensor, "layers batch"]


class ForwardForward(Classifier):
    """The layers of the core, one after another; the class stands in the row before the patches. metrics:
    `right_layer0`, ..., the share of images that a layer finds better with their right class than with the wrong one.
    Depth is the number of layers that are asked; there are no more than the core has.
    """

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        return cls(model, config.forward_forward)

    def __init__(self, model: LanguageModel, config: ForwardForwardConfig):
        super().__init__()
        self.model = model
        self.config = config
        for unread in (model.norm, model.head):
            if unread is not None:
                unread.requires_grad_(False)

    @property
    def layers(self) -> list[TransformerLayer]:
        return list(self.model.recurrence.core.blocks[0].layers)

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        batch = Batch.of(tokens)
        labels, e = batch.targets[:, 0], self.encode(batch)
        shown = torch.cat([labels, self.wrong(e, labels, batch, random)])
        beyond = self.goodness(e.repeat(2, 1, 1), shown, batch) - self.threshold
        right, wrong = beyond.chunk(2, dim=1)
        value = (softplus(-right) + softplus(wrong)).mean() / 2
        found = {f"right_layer{layer}": share for layer, share in enumerate((right > wrong).float().mean(1))}
        return Loss(value, {"loss": value.detach()} | found)

    @property
    def threshold(self) -> float:
        return self.config.threshold * (self.model.width if self.config.goodness == "sum" else 1)

    def encode(self, batch: Batch) -> State:
        """The patches, and the row for the class."""
        return self.model.encode(batch.inputs, rows_of_batch(batch))

    def wrong(self, e: State, labels: Labels, batch: Batch, random: StepRandom) -> Labels:
        """A class of each image that is not its own."""
        uniform, num = random.uniform("wrong class", ()), self.model.vocab_size
        if self.config.negatives == "uniform":
            return (labels + 1 + (uniform * (num - 1)).long().to(labels.device)) % num
        with torch.no_grad():
            found = self.found(e, batch, len(self.layers))
        own = torch.arange(num, device=labels.device) == labels.unsqueeze(1)
        return draw(found.masked_fill(own, -math.inf).softmax(-1), uniform)

    def goodness(self, e: State, labels: Labels, batch: Batch, depth: int | None = None) -> Goodness:
        """The goodness of each of the first `depth` layers (None: all), with these classes in the images."""
        rows = Rows(mask=EVERYBODY, rotation=self.model.rotary(batch.positions[:1]))
        named = self.model.embed_scale * self.model.embed(labels).unsqueeze(1)
        x, found = normalised(torch.cat([e[:, :1] + named, e[:, 1:]], dim=1)), []
        for layer in self.layers[:depth]:
            x = layer(x, None, rows)
            squares = (x[:, :1] if self.config.rows == "class" else x).float().square()
            found.append((squares.sum(-1) if self.config.goodness == "sum" else squares.mean(-1)).mean(1))
            x = self.passed_on(x)
        return torch.stack(found)

    def passed_on(self, x: State) -> State:
        """What a layer hands to the next."""
        return normalised(x.detach())

    def found(self, e: State, batch: Batch, depth: int) -> Float[Tensor, "batch classes"]:
        """The goodness of each class to the layers beyond the first, of the first `depth`; all classes in one batch."""
        num = self.model.vocab_size
        labels = torch.arange(num, device=e.device).repeat(len(e))
        found = self.goodness(e.repeat_interleave(num, dim=0), labels, batch, depth)
        return (found[1:] if len(found) > 1 else found).sum(0).view(len(e), num)

    def class_logits(self, batch: Batch, depth: int, random: StepRandom, *,
                     stream: str = "") -> Float[Tensor, "batch classes"]:
        return self.found(self.encode(batch), batch, depth)

    def class_cost(self, depth: int) -> tuple[int, tuple[float, ...], int]:
        """Each class is tried in each layer."""
        classes = self.model.vocab_size
        return 0, (float(classes * min(depth, len(self.layers))),), classes

    def layer_forwards(self) -> float:
        tried = self.model.vocab_size if self.config.negatives == "hard" else 0
        return (2 * 3 + tried) * len(self.layers)


def normalised(x: State) -> State:
    """Rows of unit mean square."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:])
