"""Settings of the rules that run a loop: its depth, its supervised segments, and the fixed point of the core."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from looped.config.base import Count, Depth, Fraction, NonNegative, Positive, Section

FEWEST_STEPS = {"fixed_point_iter": 1, "broyden": 2, "anderson": 3}
"""Solver -> applications of the core before its first estimate."""


class RecurrenceConfig(Section):
    """The depth of the loop under `full`, `truncated` and `progressive`."""

    mean: Depth = Field(
        default=8,
        description="mean number of loop steps, and one more on average where Huginn's sampler draws them; `full` runs "
                    "exactly this many, `progressive` at most")
    backprop: Depth = Field(default=4, description="number of last steps that carry gradient under `truncated`")
    distribution: Literal["huginn", "fixed"] = Field(
        default="huginn", description="log-normal Poisson, or always `mean`")
    quantile: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="depths above this quantile of `huginn` are drawn anew: a batch runs as many steps as its deepest "
                    "sequence, of 128 with a mean depth of 33 on average 110, and 65 at 0.95; 1 draws none anew")
    per_sequence: bool = Field(
        default=True, description="one depth per sequence (Parcae) instead of one per batch (Huginn)")
    loss_on: Literal["last", "every", "gate"] = Field(
        default="last",
        description="loss after the last step, or after every step that carries gradient; gate (`full`): after every "
                    "step, weighted by the probability that model.exit_gate exits there, which trains the gate (Ouro)")
    gate_entropy: NonNegative = Field(
        default=0.1,
        description="weight in the loss of the entropy of the exit distribution, against a collapse to one pass")
    from_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="share of the budget that `full` and `truncated` train in a single pass before the loop begins, at "
                    "the cost of `ar`")
    progressive_weight: Fraction = Field(
        default=1.0,
        description="weight of the progressive loss under `progressive`; the loss of a full unroll has the rest")
    damping: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="fraction of the old state that a loop step keeps when solving problems; 0 is the plain loop")

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

    @model_validator(mode="after")
    def _check_steps(self):
        fewest = FEWEST_STEPS[self.solver]
        if self.max_steps < fewest:
            raise ValueError(f"max_steps {self.max_steps} ends solver {self.solver} before its first estimate; set it "
                             f"to {fewest} or more")
        return self
