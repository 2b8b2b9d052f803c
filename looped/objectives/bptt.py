"""Back-propagation through the loop: through all of it (`Full`), through its last steps (`Truncated`, Huginn), or
through the one step that makes it an ordinary language model (`Autoregressive`)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from looped.config import RecurrenceConfig
from looped.data.batch import Batch
from looped.models.language import LanguageModel
from looped.objectives.base import Loss, Objective, head_losses, surroundings
from looped.objectives.depth import expected_depths, sample_depths
from looped.rng import StepRandom


class Unrolled(Objective):
    """Next-token cross-entropy after an unroll of the loop; subclasses say how deep."""

    def __init__(self, model: LanguageModel, config: RecurrenceConfig):
        super().__init__()
        self.model, self.config = model, config

    def depths(self, random: StepRandom) -> tuple[int | Tensor, int | Tensor]:
        """(steps without gradient, steps with it) of a training step."""
        raise NotImplementedError

    def expected_depths(self) -> tuple[float, float]:
        """Their means."""
        raise NotImplementedError

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        batch = Batch.of(tokens)
        no_grad, grad = self.depths(random)
        rows = surroundings(batch)
        e = self.model.encode(batch.inputs, **rows)
        noise = random.normal("state", e.shape[1:]) if self.model.recurrence.needs_noise else None
        losses: list[Tensor] = []

        def read(index: int, state: Tensor) -> None:
            if self.config.loss_on == "every" and index >= no_grad:
                losses.append(self.read_out(state, batch, rows))

        state = self.model.unroll(e, no_grad=no_grad, grad=grad, noise=noise, callback=read, **rows)
        value = torch.stack(losses or [self.read_out(state, batch, rows)]).mean()
        steps = no_grad + grad
        mean_steps = steps.float().mean() if isinstance(steps, Tensor) else float(steps)
        return Loss(value, {"loss": value.detach(), "num_steps": mean_steps})

    def read_out(self, state: Tensor, batch: Batch, rows: dict) -> Float[Tensor, "batch"]:
        """Cross-entropy of each sequence, read from a state."""
        return batch.mean(head_losses(self.model, self.model.hidden(state, **rows), batch.targets))

    def layer_forwards(self) -> float:
        c = self.model.config
        no_grad, grad = self.expected_depths()
        coda = c.num_coda_layers * (grad if self.config.loss_on == "every" else 1)
        return no_grad * c.num_core_layers + 3 * (grad * c.num_core_layers + c.num_prelude_layers + coda)


class Full(Unrolled):
    """Gradient through every one of `mean` steps."""

    def depths(self, random: StepRandom) -> tuple[int, int]:
        return 0, self.config.mean

    def expected_depths(self) -> tuple[float, float]:
        return 0.0, float(self.config.mean)


class Truncated(Unrolled):
    """Sampled depth, gradient through the last `backprop` steps."""

    def depths(self, random: StepRandom) -> tuple[int | Tensor, int | Tensor]:
        return sample_depths(self.config, random)

    def expected_depths(self) -> tuple[float, float]:
        return expected_depths(self.config)


class Autoregressive(Unrolled):
    """The twin without a loop: the same layers, one step, next-token loss. A denoiser is held against it."""

    def depths(self, random: StepRandom) -> tuple[int, int]:
        return 0, 1

    def expected_depths(self) -> tuple[float, float]:
        return 0.0, 1.0
