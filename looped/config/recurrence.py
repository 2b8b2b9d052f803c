"""Settings of the rules that run a loop: its depth, its supervised segments, and the fixed point of the core."""

import math
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from looped.config.base import Count, Depth, Fraction, NonNegative, Positive, Section

FEWEST_STEPS = {"fixed_point_iter": 1, "broyden": 2, "anderson": 3}
"""Solver -> applications of the core before its first estimate."""


Distribution = Literal["huginn", "fixed", "listed"]


class Stage(Section):
    """A part of training, before its last, in which the loop is run to other depths; a setting that is null has the
    section's value."""

    until: Annotated[float, Field(gt=0, lt=1)] = Field(description="share of the budget at which the stage ends")
    mean: Depth | None = Field(default=None, description="as recurrence.mean")
    backprop: Depth | None = Field(default=None, description="as recurrence.backprop")
    distribution: Distribution | None = Field(default=None, description="as recurrence.distribution")
    depths: dict[Depth, Positive] | None = Field(default=None, description="as recurrence.depths")

    @property
    def own(self) -> dict[str, Any]:
        """The settings that differ from the section's."""
        return {name: value for name, value in self if name != "until" and value is not None}


class RecurrenceConfig(Section):
    """The depth of the loop under `full`, `truncated` and `progressive`."""

    mean: Depth = Field(
        default=8,
        description="mean number of loop steps, and one more on average where Huginn's sampler draws them; `full` runs "
                    "exactly this many, `progressive` at most")
    backprop: Depth = Field(default=4, description="number of last steps that carry gradient under `truncated`")
    distribution: Distribution = Field(
        default="huginn", description="log-normal Poisson, always `mean`, or drawn from `depths` (listed)")
    depths: dict[Depth, Positive] = Field(
        default={},
        description="the depths that `listed` draws from, each with its weight: {1: 5, 4: 1} runs four steps in a "
                    "sixth of the sequences and one in the others; `mean`, one of them, is then only the depth of "
                    "samples, of comparisons and of the initial weights' scale")
    quantile: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="depths above this quantile of `huginn` are drawn anew: a batch runs as many steps as its deepest "
                    "sequence, of 128 with a mean depth of 33 on average 110, and 65 at 0.95; 1 draws none anew")
    per_sequence: bool = Field(
        default=True, description="one depth per sequence (Parcae) instead of one per batch (Huginn)")
    loss_on: Literal["last", "every", "gate", "distil"] = Field(
        default="last",
        description="loss after the last step, or after every step that carries gradient; gate (`full`): after every "
                    "step, weighted by the probability that model.exit_gate exits there, which trains the gate (Ouro); "
                    "distil: after the last, whose prediction teaches those of the earlier steps with gradient")
    gate_entropy: NonNegative = Field(
        default=0.1,
        description="weight in the loss of the entropy of the exit distribution, against a collapse to one pass")
    distil_weight: Positive = Field(
        default=1.0,
        description="weight in the loss of the mean divergence, in nats/token, of the earlier steps' predictions from "
                    "the last (`recurrence.loss_on` distil)")
    distil_temperature: Positive = Field(
        default=1.0, description="divisor of the logits that are compared; above 1 unlikely tokens count more")
    from_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="share of the budget that `full` and `truncated` train in a single pass before the loop begins, at "
                    "the cost of `ar`")
    stages: tuple[Stage, ...] = Field(
        default=(),
        description="parts of the budget, before the last, in which `full` and `truncated` run the loop to other "
                    "depths: [{until: 0.3, mean: 1}, {until: 0.6, mean: 2}] takes one step, then two, then `mean`; "
                    "each has `until`, the share of the budget at which it ends, and mean as here; of `truncated` also "
                    "backprop, distribution and depths")
    progressive_weight: Fraction = Field(
        default=1.0,
        description="weight of the progressive loss under `progressive`; the loss of a full unroll has the rest")
    damping: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="fraction of the old state that a loop step keeps in evaluation; 0 is the plain loop, which can "
                    "cycle around the fixed point that a solver has found")
    state_noise: NonNegative = Field(
        default=0.0,
        description="standard deviation of the normal noise that training adds to the state before each loop step, in "
                    "units of the RMS of each row of the state; 0 adds none")

    @model_validator(mode="after")
    def _check_depths(self):
        if self.distribution == "listed" and not self.depths:
            raise ValueError("distribution listed draws from depths, which is empty; set depths, as {1: 3, 4: 1}, or "
                             "distribution to fixed")
        return self

    @model_validator(mode="after")
    def _check_stages(self):
        if self.stages and self.from_share:
            raise ValueError(f"stages and from_share {self.from_share:g} both say how training begins; give the single "
                             f"pass as the first of the stages, as {{until: {self.from_share:g}, mean: 1}}")
        ends = [stage.until for stage in self.stages]
        for before, after in pairwise(ends):
            if after <= before:
                raise ValueError(f"stages has one until {after:g} after one until {before:g}; order them by until, "
                                 f"each above the one before")
        for stage in self.stages:
            self._in_stage(stage)  # raises for settings that do not fit together
            if not stage.own:
                raise ValueError(f"stages has one until {stage.until:g} that changes nothing; give it a mean, "
                                 f"backprop, distribution or depths, or leave it out")
        return self

    @property
    def parts(self) -> "tuple[RecurrenceConfig, ...]":
        """The settings of each stage and, last, those of the section itself; none has stages of its own."""
        return *map(self._in_stage, self.stages), self.model_copy(update={"stages": ()})

    def _in_stage(self, stage: Stage) -> "RecurrenceConfig":
        try:
            return RecurrenceConfig.model_validate(self.model_dump() | stage.own | {"stages": ()})
        except ValidationError as error:
            raise ValueError(f"stages, until {stage.until:g}: {error.errors()[0]['ctx']['error']}") from None

    @property
    def listed(self) -> dict[Depth, Positive] | None:
        """The depths that are drawn, with their weights; None if they are not listed."""
        return self.depths if self.distribution == "listed" else None

    @property
    def mean_depth(self) -> float:
        """The mean number of loop steps of the last stage."""
        total = sum(self.depths.values())
        listed = sum(depth * weight for depth, weight in self.depths.items()) / total if total else 0.0
        return {"huginn": self.mean + 1.0, "fixed": float(self.mean), "listed": listed}[self.distribution]

    @property
    def ends(self) -> tuple[float, ...]:
        """The share of the budget at which each of `parts` ends."""
        return *(stage.until for stage in self.stages), 1.0

    @property
    def first_end(self) -> float:
        """The share of the budget at which the loop changes for the first time; infinite without stages."""
        return self.from_share or (self.stages[0].until if self.stages else math.inf)

    @property
    def cap(self) -> float:
        """The quantile above which depths are drawn anew, 1 if they are not drawn."""
        return self.quantile if self.distribution == "huginn" else 1.0


class SupervisionConfig(Section):
    """Segments of the loop under `one-step`, each supervised at its last step."""

    segments: Depth = Field(
        default=8,
        description="segments S per training step, each starting from the detached state of the one before "
                    "(`one-step`)")
    # HRM runs its modules twice per segment and TRM three times; only the last of these runs carries gradient.
    steps: Count = Field(
        default=1,
        description="loop steps without gradient in each segment, before its one step with gradient; 1 as in HRM, 2 as "
                    "in TRM")
    halt_weight: NonNegative = Field(
        default=0.5, description="weight of the halting head's loss, added to the cross-entropy")
    update: Literal["batch", "segment"] = Field(
        default="batch",
        description="one update of the weights for all segments of a batch, or one after every segment, with the "
                    "states carried to the next step and a sequence replaced when the halting head lets it go, or "
                    "after `segments` segments (HRM, TRM)")
    explore: Fraction = Field(
        default=0.1,
        description="probability, at each segment, that a sequence may not leave before a number of segments drawn "
                    "from 2 to `segments` (`update` segment)")

    @property
    def segments_per_update(self) -> int:
        return {"batch": self.segments, "segment": 1}[self.update]


class FixedPointConfig(Section):
    """The solver of the core's fixed point under `fixed-point`, and its gradient."""

    solver: Literal["fixed_point_iter", "anderson", "broyden"] = Field(
        default="anderson", description="solver of TorchDEQ; broyden stores 2 * max_steps states")
    max_steps: Depth = Field(
        default=24,
        description="maximum number of core applications by the solver, and by the solver of the implicit gradient")
    tol: NonNegative = Field(
        default=1e-3,
        description="tolerance: the solver stops when no sequence's state changes by more than this fraction of its "
                    "norm")
    gradient: Literal["phantom", "implicit"] = Field(
        default="phantom",
        description="phantom: through a few damped steps from the fixed point; implicit: the implicit function "
                    "theorem, a second solve in backward")
    phantom_steps: Depth = Field(default=1, description="steps of the phantom gradient")
    tau: Annotated[Positive, Field(le=1)] = Field(
        default=1.0, description="fraction of a phantom step that is new; the rest is the previous state")
    head_start: Literal["none", "pass"] = Field(
        default="none",
        description="start of the solver: the initial state; or pass: the state of a first pass with gradient and a "
                    "loss of its own, so that after training the model can be run at depth 1, without the solver "
                    "(Attractor)")
    head_start_weight: Positive = Field(default=1.0, description="weight of the loss of the first pass")

    @model_validator(mode="after")
    def _check_steps(self):
        fewest = FEWEST_STEPS[self.solver]
        if self.max_steps < fewest:
            raise ValueError(f"max_steps {self.max_steps} ends solver {self.solver} before its first estimate; set it "
                             f"to {fewest} or more")
        return self
