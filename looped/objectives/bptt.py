"""Back-propagation through the unrolled loop: through all steps (`Full`), the last steps (`Truncated`, Huginn), steps
after a random number without gradient (`Progressive`, Deep Thinking), or the single step of an ordinary language model
(`Autoregressive`)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from looped.config import Config
from looped.config.recurrence import RecurrenceConfig
from looped.data.batch import Batch
from looped.models.language import LanguageModel
from looped.nn.depth_sampling import expected_depths, huginn_quantiles, sample_depths
from looped.nn.exit_gate import gate_of
from looped.nn.rows import Rows
from looped.nn.state_noise import StateNoise
from looped.objectives.base import Loss, Objective, head_losses, rows_of_batch
from looped.objectives.rule_depths import (
    depth_decisions,
    expected_progressive_depths,
    mean_progressive_depths,
    progressive_shares,
    sample_progressive_depths,
)
from looped.objectives.step_losses import READINGS, Alike
from looped.rng import StepRandom
from looped.tensor_types import Float, Int


@dataclass(frozen=True)
class Start:
    """A batch before its first loop step: `rows` its attention mask and positions, `e` the encoded input, `noise` the
    draws of a random initial state, `disturb` the noise along the path (None: without)."""

    batch: Batch
    rows: Rows
    e: Float[Tensor, "batch length width"]
    noise: Float[Tensor, "batch length width"] | None
    disturb: StateNoise | None


class Unrolled(Objective):
    """Next-token cross-entropy after an unroll of the loop; subclasses set its depth."""

    rollout = "loop"

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        return cls(model, config.recurrence)

    def __init__(self, model: LanguageModel, config: RecurrenceConfig):
        super().__init__()
        self.model = model
        self.config = config
        if self.readings.asks_gate:
            gate_of(model).requires_grad_(True)

    @property
    def readings(self) -> type[Alike]:
        """The class that combines the losses of several steps (`recurrence.loss_on`)."""
        return READINGS[self.config.loss_on]

    def depths(self, random: StepRandom) -> tuple[int | Tensor, int | Tensor]:
        """(steps without gradient, steps with gradient) of a training step."""
        raise NotImplementedError

    def expected_depths(self) -> tuple[float, float]:
        """The means of `depths`: (steps without gradient, steps with gradient)."""
        raise NotImplementedError

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        no_grad, grad = self.depths(random)
        value = self.loss_after(self.start(tokens, random), no_grad, grad)
        steps = no_grad + grad
        mean_steps = steps.float().mean() if isinstance(steps, Tensor) else float(steps)
        return Loss(value, {"loss": value.detach(), "num_steps": mean_steps})

    def start(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Start:
        batch = self.ask(tokens)
        rows = rows_of_batch(batch)
        e = self.model.encode(batch.inputs, rows)
        noise = random.normal("state", e.shape[1:]) if self.model.recurrence.needs_noise else None
        return Start(batch, rows, e, noise, self.disturb(random))

    def disturb(self, random: StepRandom) -> StateNoise | None:
        """The noise along the path of a training step (`recurrence.state_noise`); None without."""
        return StateNoise(self.config.state_noise, random) if self.config.state_noise else None

    def loss_after(self, start: Start, no_grad: int | Tensor, grad: int | Tensor) -> Float[Tensor, ""]:
        """The loss after the last step of an unroll, or over all its steps with gradient (`recurrence.loss_on`)."""
        readings, last = self.readings(self.model, start.batch, self.config), self.config.loss_on == "last"

        def take(state: Tensor) -> None:
            readings.take(state, self.read_tokens(state, start.batch, start.rows))

        def read(index: int, state: Tensor) -> None:
            if index >= no_grad:
                take(state)

        state = self.model.unroll(start.e, start.rows, no_grad=no_grad, grad=grad, noise=start.noise,
                                  callback=None if last else read, disturb=start.disturb)
        if last:
            take(state)
        return readings.loss()

    def read_out(self, state: Tensor, batch: Batch, rows: Rows) -> Float[Tensor, "batch"]:
        """Cross-entropy of each sequence, decoded from a state."""
        return batch.mean(self.read_tokens(state, batch, rows))

    def read_tokens(self, state: Tensor, batch: Batch, rows: Rows) -> Float[Tensor, "batch length"]:
        """Cross-entropy of each token, decoded from a state."""
        return head_losses(self.model, self.model.hidden(state, rows), batch.targets)

    def layer_forwards(self) -> float:
        no_grad, grad = self.expected_depths()
        return self.cost(no_grad, grad, readings=1 if self.config.loss_on == "last" else grad)

    def cost(self, no_grad: float, grad: float, *, readings: float) -> float:
        """Layer forwards per sequence: one encoding, `no_grad` and `grad` loop steps, and `readings` readouts."""
        c, step = self.model, self.model.step_layers
        with_gradient = grad * step + c.num_prelude_layers + readings * c.num_coda_layers
        return no_grad * step + 3 * with_gradient


class Late(Unrolled):
    """A loop that begins after `from_share` of the budget; before, the core is applied in a single pass, as by `ar`.

    Subclasses give the depth of the loop as `loop_depths` and its mean as `loop_means`.
    """

    spent: float | None = None
    """Fraction of the budget spent before this step; None where nobody trains, as in evaluations."""

    @property
    def changes(self) -> str:
        return f"the loop begins after {self.config.from_share:g} of them" if self.config.from_share else ""

    def loop_depths(self, random: StepRandom) -> tuple[int | Tensor, int | Tensor]:
        """(steps without gradient, steps with gradient) of a training step in which the loop runs."""
        raise NotImplementedError

    def loop_means(self) -> tuple[float, float]:
        """The means of `loop_depths`."""
        raise NotImplementedError

    def before_step(self, spent: float) -> None:
        self.spent = spent

    @property
    def single(self) -> tuple[int, int]:
        """The depths of a single pass: one step of each block."""
        return 0, self.model.recurrence.num_blocks

    def depths(self, random: StepRandom) -> tuple[int | Tensor, int | Tensor]:
        before = self.spent is not None and self.training and self.spent < self.config.from_share
        return self.single if before else random.decide("depth", self.loop_depths)

    def expected_depths(self) -> tuple[float, float]:
        """The means of `depths`: of this step, or of all steps of a run where nobody trains."""
        share = self.config.from_share if self.spent is None else float(self.spent < self.config.from_share)
        no_grad, grad = (share * single + (1 - share) * looped
                         for single, looped in zip(self.single, self.loop_means(), strict=True))
        return no_grad, grad

    def decisions(self) -> list[tuple[float, dict[str, Any]]]:
        share, looped = self.config.from_share, depth_decisions(*self.loop_means())
        before = [(share, {"depth": self.single})] if share else []
        return before + [(weight * (1 - share), decided) for weight, decided in looped]


class Full(Late):
    """Gradient through all `mean` steps."""

    def loop_depths(self, random: StepRandom) -> tuple[int, int]:
        return 0, self.config.mean

    def loop_means(self) -> tuple[float, float]:
        return 0.0, float(self.config.mean)


class Truncated(Late):
    """Sampled depth, gradient through the last `backprop` steps."""

    @property
    def changes(self) -> str:
        return super().changes if self.config.distribution == "fixed" else "the depth is drawn at every step"

    @property
    def backprop(self) -> int | None:
        return self.config.backprop

    def loop_depths(self, random: StepRandom) -> tuple[int | Tensor, int | Tensor]:
        c = self.config
        return sample_depths(c.mean, c.backprop, random, distribution=c.distribution, per_sequence=c.per_sequence,
                             quantile=c.cap)

    def loop_means(self) -> tuple[float, float]:
        c = self.config
        return expected_depths(c.mean, c.backprop, distribution=c.distribution, quantile=c.cap)

    @classmethod
    def trained_depths(cls, config: Config) -> tuple[int, int]:
        """(smallest, largest) depth in the middle 90 % of those that Huginn's sampler draws."""
        recurrence = config.recurrence
        if recurrence.distribution == "fixed":
            return recurrence.mean, recurrence.mean
        low, high = huginn_quantiles(recurrence.mean, (0.05 * recurrence.quantile, 0.95 * recurrence.quantile))
        return low, high


class Progressive(Unrolled):
    """Progressive loss: n steps without gradient, then k with it, so that the loop learns to continue from any state.

    The loss is a * loss after those n + k steps + (1 - a) * loss after a full unroll of `mean` steps, with a =
    `progressive_weight` (Bansal et al. 2022, "End-to-end Algorithm Synthesis with Recurrent Networks", arXiv
    2202.05826, section 3.2). n and k are drawn once per optimiser step. A part with weight 0 is not run.
    """

    changes = "the depths are drawn at every step"

    def depths(self, random: StepRandom) -> tuple[int, int]:
        return random.decide("depth", lambda step: sample_progressive_depths(self.config.mean, step))

    def decisions(self) -> list[tuple[float, dict[str, Any]]]:
        return depth_decisions(*mean_progressive_depths(self.config.mean))

    @classmethod
    def trained_depths(cls, config: Config) -> tuple[int, int]:
        return 1, config.main_depth

    def expected_depths(self) -> tuple[float, float]:
        """The mean steps of both parts together: (without gradient, with gradient)."""
        return expected_progressive_depths(self.config)

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        start, drawn = self.start(tokens, random), self.depths(random)
        shares = progressive_shares(self.config)
        losses = {part: self.loss_after(start, *(drawn if part == "progressive" else (0, self.config.mean)))
                  for part in shares}
        value = sum(shares[part] * loss for part, loss in losses.items())
        metrics = {f"loss_{part}": loss.detach() for part, loss in losses.items()}
        return Loss(value, {"loss": value.detach(), "num_steps": float(sum(drawn))} | metrics)

    def layer_forwards(self) -> float:
        no_grad, grad = self.expected_depths()
        readings = len(progressive_shares(self.config)) if self.config.loss_on == "last" else grad
        return self.cost(no_grad, grad, readings=readings)


class Autoregressive(Unrolled):
    """The autoregressive baseline without a loop: the same layers, one step (or one step per block), next-token loss.
    Denoisers are compared with it."""

    readings = Alike

    def disturb(self, random: StepRandom) -> None:
        """No noise: a single pass has no path."""

    def depths(self, random: StepRandom) -> tuple[int, int]:
        return 0, self.model.recurrence.num_blocks

    def expected_depths(self) -> tuple[float, float]:
        return 0.0, float(self.model.recurrence.num_blocks)
