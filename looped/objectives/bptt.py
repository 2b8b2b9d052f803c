"""Back-propagation through the loop: through all of it (`Full`), through its last steps (`Truncated`, Huginn), or
through the one step that makes it an ordinary language model (`Autoregressive`)."""

from jaxtyping import Int
from torch import Tensor

from looped.config import RecurrenceConfig
from looped.models.language import LanguageModel
from looped.objectives.base import Loss, Objective, head_losses
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

    def forward(self, tokens: Int[Tensor, "batch length_and_one"], random: StepRandom) -> Loss:
        x, y = tokens[:, :-1], tokens[:, 1:]
        no_grad, grad = self.depths(random)
        e = self.model.encode(x)
        noise = random.normal("state", e.shape[1:]) if self.model.recurrence.needs_noise else None
        state = self.model.unroll(e, no_grad=no_grad, grad=grad, noise=noise)
        value = head_losses(self.model, self.model.hidden(state), y).mean()
        steps = no_grad + grad
        mean_steps = steps.float().mean() if isinstance(steps, Tensor) else float(steps)
        return Loss(value, {"loss": value.detach(), "num_steps": mean_steps})

    def layer_forwards(self) -> float:
        c = self.model.config
        no_grad, grad = self.expected_depths()
        return no_grad * c.num_core_layers + 3 * (grad * c.num_core_layers + c.num_prelude_layers + c.num_coda_layers)


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
