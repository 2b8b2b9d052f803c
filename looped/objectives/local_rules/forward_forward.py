"""Forward-Forward: each layer is trained locally to be active for an image with its correct class, and not otherwise.

    loss = mean over layers of [ softplus(theta - g(x, y)) + softplus(g(x, not y) - theta) ] / 2

The goodness g of a layer is the mean (or sum) of its squared activations, in the class row or in all rows. The output
of a layer is detached and normalised, so that the next layer cannot read the goodness from its norm. The predicted
class is the one with the largest sum of goodness over the layers after the first. Hinton 2022 (arXiv 2212.13345),
sections 2 and 3.3.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from looped.config import Config
from looped.config.local_rules import ForwardForwardConfig
from looped.data.batch import Batch
from looped.diffusion.clean_estimate import draw
from looped.models.language import LanguageModel, State
from looped.nn.layers import TransformerLayer
from looped.nn.rows import Rows
from looped.objectives.base import EVERYBODY, Classifier, Loss, Objective, rows_of_batch
from looped.rng import StepRandom
from looped.tensor_types import Float, Int

Labels = Int[Tensor, "batch"]
Goodness = Float[Tensor, "layers batch"]


class ForwardForward(Classifier):
    """Local training of the layers of the core; the class is in the row before the patches.

    metrics: `right_layer0`, ..., the fraction of images with higher goodness in a layer for the correct class than for
    the wrong one. Depth is the number of layers used, at most the layers of the core.
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
        """The encoded patches, with a row for the class before them."""
        return self.model.encode(batch.inputs, rows_of_batch(batch))

    def wrong(self, e: State, labels: Labels, batch: Batch, random: StepRandom) -> Labels:
        """A wrong class for each image."""
        uniform, num = random.uniform("wrong class", ()), self.model.vocab_size
        if self.config.negatives == "uniform":
            return (labels + 1 + (uniform * (num - 1)).long().to(labels.device)) % num
        with torch.no_grad():
            found = self.found(e, batch, len(self.layers))
        own = torch.arange(num, device=labels.device) == labels.unsqueeze(1)
        return draw(found.masked_fill(own, -math.inf).softmax(-1), uniform)

    def goodness(self, e: State, labels: Labels, batch: Batch, depth: int | None = None) -> Goodness:
        """The goodness in each of the first `depth` layers (None: all) of images with these classes."""
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
        """The output of a layer as the next layer receives it."""
        return normalised(x.detach())

    def found(self, e: State, batch: Batch, depth: int) -> Float[Tensor, "batch classes"]:
        """The goodness of each class, summed over layers 2 to `depth` (layer 1 if `depth` is 1).

        All classes run in one batch.
        """
        num = self.model.vocab_size
        labels = torch.arange(num, device=e.device).repeat(len(e))
        found = self.goodness(e.repeat_interleave(num, dim=0), labels, batch, depth)
        return (found[1:] if len(found) > 1 else found).sum(0).view(len(e), num)

    def class_logits(self, batch: Batch, depth: int, random: StepRandom, *,
                     stream: str = "") -> Float[Tensor, "batch classes"]:
        return self.found(self.encode(batch), batch, depth)

    def class_cost(self, depth: int) -> tuple[int, tuple[float, ...], int]:
        """The cost of `class_logits`, which tries each class in each layer."""
        classes = self.model.vocab_size
        return 0, (float(classes * min(depth, len(self.layers))),), classes

    def layer_forwards(self) -> float:
        tried = self.model.vocab_size if self.config.negatives == "hard" else 0
        return (2 * 3 + tried) * len(self.layers)


def normalised(x: State) -> State:
    """Rows of unit mean square."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:])
