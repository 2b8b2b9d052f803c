"""Back-propagation through the unrolled loop: through all steps (`Full`), the last steps (`Truncated`, Huginn), steps
after a random number without gradient (`Progressive`, Deep Thinking), or the single step of an ordinary language model
(`Autoregressive`)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from looped.config import Config
from looped.config.recurrence import RecurrenceConfig
from looped.data.batch import Batch
from looped.models.language import LanguageModel
from looped.nn.depth_sampling import Depths, Fixed, depths_of, split_depths
from looped.nn.exit_gate import gate_of
from looped.nn.rows import Rows
from looped.nn.state_noise import StateNoise
from looped.objectives.base import Loss, Objective, rows_of_batch
from looped.objectives.kept_states import NothingKept, kept_states
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
    draws of a random initial state, `disturb` the noise along the path (None: without), `state` another one than the
    initial state, `keep` what takes the last state."""

    batch: Batch
    rows: Rows
    e: Float[Tensor, "batch length width"]
    noise: Float[Tensor, "batch length width"] | None
    disturb: StateNoise | None = None
    state: Float[Tensor, "batch length width"] | None = None
    keep: Callable[[Tensor], None] = lambda state: None


@dataclass(frozen=True)
class StageDepths:
    """The depths from `start` to `end`, shares of the budget; the last `backprop` steps carry gradient."""

    start: float
    end: float
    distribution: Depths
    backprop: int

    @property
    def share(self) -> float:
        return self.end - self.start

    @property
    def decision(self) -> str:
        """Name of the drawn depth (`StepRandom.decide`): one for each stage, since it is drawn ahead of its step."""
        return "depth" if self.end == 1 else f"depth until {self.end:g}"

    def draw(self, random: StepRandom) -> tuple[int | Tensor, int | Tensor]:
        """(steps without gradient, steps with gradient) of a training step."""
        return split_depths(self.distribution.draw(random), self.backprop)

    def means(self) -> tuple[float, float]:
        """The means of `draw`."""
        return self.distribution.expected(self.backprop)


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
    def damping(self) -> float:
        """The fraction of the state that a step keeps in evaluation."""
        return self.config.damping

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
        readings = self.readings(self.model, start.batch, start.rows, self.config)
        last = self.config.loss_on == "last"

        def read(index: int, state: Tensor) -> None:
            if index >= no_grad:
                readings.take(state)

        noise = start.noise if start.state is None else None
        state = self.model.unroll(start.e, start.rows, no_grad=no_grad, grad=grad, noise=noise,
                                  state=start.state, callback=None if last else read, disturb=start.disturb)
        start.keep(state)
        if last:
            readings.take(state)
        return readings.loss()

    def read_out(self, state: Tensor, batch: Batch, rows: Rows) -> Float[Tensor, "batch"]:
        """Cross-entropy of each sequence, decoded from a state."""
        return batch.mean(Alike(self.model, batch, rows, self.config).read(state))

    def layer_forwards(self) -> float:
        return self.cost_at(*self.expected_depths())

    def cost_at(self, no_grad: float, grad: float) -> float:
        """Layer forwards per sequence of a step of these depths."""
        return self.cost(no_grad, grad, readings=1 if self.config.loss_on == "last" else grad)

    def cost(self, no_grad: float, grad: float, *, readings: float) -> float:
        """Layer forwards per sequence: one encoding, `no_grad` and `grad` loop steps, and `readings` readouts."""
        c, step = self.model, self.model.step_layers
        with_gradient = grad * step + c.num_prelude_layers + readings * c.num_coda_layers
        return no_grad * step + 3 * with_gradient


class Staged(Unrolled):
    """A loop with one depth after the other: those of `recurrence.stages` while their shares of the budget last, then
    the section's own. With `from_share` the first stage is a single pass of the core, as by `ar`.

    Subclasses give the distribution of the depths of a stage (`depths_in`) and the gradient's reach (`reach_in`).
    budget_unit: the unit of which the stages have shares (`training.budget_unit`).
    """

    spent: float | None = None
    """Fraction of the budget spent before this step; None where nobody trains, as in evaluations."""

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        return cls(model, config.recurrence, kept_states(config, model), config.training.budget_unit)

    def __init__(self, model: LanguageModel, config: RecurrenceConfig, kept: NothingKept | None = None,
                 budget_unit: str = "steps"):
        super().__init__(model, config)
        self.kept: NothingKept = NothingKept() if kept is None else kept
        self.budget_unit = budget_unit
        self.stages: list[StageDepths] = list(self._stages())

    def depths_in(self, part: RecurrenceConfig) -> Depths:
        """The distribution of the depth in a stage with these settings."""
        raise NotImplementedError

    def reach_in(self, part: RecurrenceConfig) -> int:
        """The number of last steps that carry gradient in a stage with these settings."""
        raise NotImplementedError

    def _stages(self) -> Iterator[StageDepths]:
        c, num_blocks = self.config, self.model.recurrence.num_blocks
        if c.from_share:
            yield StageDepths(0.0, c.from_share, Fixed(num_blocks), num_blocks)
        start = c.from_share
        for end, part in zip(c.ends, c.parts, strict=True):
            yield StageDepths(start, end, self.depths_in(part), self.reach_in(part))
            start = end

    @property
    def changes(self) -> str:
        starts = ", ".join(f"{stage.start:g}" for stage in self.stages[1:])
        return self.kept.clause or (f"the depth of the loop changes after {starts} of them" if starts else "")

    @property
    def one_process(self) -> str:
        return self.kept.one_process

    def before_training(self, train: Any) -> str:
        return self.kept.prepare(train)

    def to_carry(self) -> dict[str, Tensor]:
        return self.kept.tensors()

    def carry_on(self, tensors: dict[str, Tensor]) -> None:
        self.kept.take_up(tensors)

    def before_step(self, spent: float) -> None:
        self.spent = spent

    def after_step(self) -> None:
        self.kept.store()

    def start(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Start:
        start = super().start(tokens, random)
        if not self.training:
            return start
        return replace(start, **self.kept.visit(
            start.e, lambda: self.model.initial_state(start.e, start.noise), random))

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        loss = super().forward(tokens, random)
        return replace(loss, metrics=loss.metrics | self.kept.metrics()) if self.training else loss

    @property
    def stage(self) -> StageDepths:
        """The stage of this step, or the last one where nobody trains."""
        return self.stages[-1] if self.spent is None or not self.training else self.stage_at(self.spent)

    def stage_at(self, spent: float) -> StageDepths:
        """The stage of a step before which this fraction of the budget is spent."""
        return next((stage for stage in self.stages if spent < stage.end), self.stages[-1])

    def depths(self, random: StepRandom) -> tuple[int | Tensor, int | Tensor]:
        return random.decide(self.stage.decision, self.stage.draw)

    def expected_depths(self) -> tuple[float, float]:
        """The means of `depths`: of this step, or of all steps of a run where nobody trains."""
        if self.spent is not None:
            return self.stage_at(self.spent).means()
        no_grad, grad = (sum(share * mean for share, mean in zip(self.shares, means, strict=True))
                         for means in zip(*(stage.means() for stage in self.stages), strict=True))
        return no_grad, grad

    @property
    def shares(self) -> list[float]:
        """The fraction of a run's steps that each stage has: its share of the budget, or, of a budget that deeper steps
        spend faster, this share over the cost of its steps; seconds are taken to pass in proportion to it."""
        alike = self.budget_unit in ("steps", "tokens")
        steps = [stage.share / (1.0 if alike else self.cost_at(*stage.means())) for stage in self.stages]
        return [each / sum(steps) for each in steps]

    def decisions(self) -> list[tuple[float, dict[str, Any]]]:
        """Of all stages, under the name of the last, which is the one that is asked for where nobody trains."""
        return [(share * weight, decided) for share, stage in zip(self.shares, self.stages, strict=True)
                for weight, decided in depth_decisions(*stage.means())]


class Full(Staged):
    """Gradient through all `mean` steps."""

    @classmethod
    def trained_depths(cls, config: Config) -> tuple[int, int]:
        return config.recurrence.mean, config.recurrence.mean * config.revisit.deepest

    def depths_in(self, part: RecurrenceConfig) -> Depths:
        return Fixed(part.mean)

    def reach_in(self, part: RecurrenceConfig) -> int:
        return part.mean


class Truncated(Staged):
    """Sampled depth, gradient through the last `backprop` steps."""

    @property
    def changes(self) -> str:
        drawn = any(part.distribution != "fixed" for part in self.config.parts)
        return "the depth is drawn at every step" if drawn else super().changes

    @property
    def backprop(self) -> int | None:
        return self.config.backprop

    def depths_in(self, part: RecurrenceConfig) -> Depths:
        return depths_of(part.distribution, part.mean, quantile=part.cap, listed=part.listed,
                         per_sequence=part.per_sequence)

    def reach_in(self, part: RecurrenceConfig) -> int:
        return part.backprop

    @classmethod
    def trained_depths(cls, config: Config) -> tuple[int, int]:
        """(smallest, largest) depth of the last stage over all visits; of Huginn's sampler the middle 90 %."""
        r = config.recurrence
        low, high = depths_of(r.distribution, r.mean, quantile=r.quantile, listed=r.listed).bounds()
        return low, high * config.revisit.deepest


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
    damping = 0.0
    """A single pass seeks no fixed point."""

    def disturb(self, random: StepRandom) -> None:
        """No noise: a single pass has no path."""

    def depths(self, random: StepRandom) -> tuple[int, int]:
        return 0, self.model.recurrence.num_blocks

    def expected_depths(self) -> tuple[float, float]:
        return 0.0, float(self.model.recurrence.num_blocks)
