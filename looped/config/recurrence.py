"""Settings of the rules that run a loop: how often, in supervised segments, or to the fixed point of the core."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from looped.config.base import Count, Depth, Fraction, NonNegative, Positive, Section

FEWEST_STEPS = {"fixed_point_iter": 1, "broyden": 2, "anderson": 3}
"""Solver -> applications of the core before it has anything to return but what it was given."""


class RecurrenceConfig(Section):
    """The depth of the loop under `full`, `truncated` and `progressive`."""

    mean: Depth = Field(8, description="mean number of loop steps; `full` runs exactly this many, `progressive` at "
                                       "most")
    backprop: Depth = Field(4, description="last steps that carry gradient under `truncated`")
    distribution: Literal["huginn", "fixed"] = Field("huginn", description="log-normal Poisson, or always `mean`")
    per_sequence: bool = Field(True, description="one depth a sequence (Parcae) instead of one a batch (Huginn)")
    loss_on: Literal["last", "every", "gate"] = Field(
        "last", description="the loss is read after the last step, or after every step that carries gradient; gate "
                            "(`full`): after every one, each weighed by the chance that model.exit_gate leaves there, "
                            "which is learned so (Ouro)")
    gate_entropy: NonNegative = Field(
        0.1, description="weight of the entropy of that choice in the loss, against one pass that takes all")
    progressive_weight: Fraction = Field(
        1.0, description="weight of the progressive loss under `progressive`; the rest is that of a full unroll")
    damping: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the old state that a step keeps when problems are solved; 0 is the plain loop")


class SupervisionConfig(Section):
    """Segments of the loop under `one-step`, each taught by its own last step."""

    segments: Depth = Field(8, description="segments S of a training step, each from the state of the one before, "
                                           "through which no gradient flows (`one-step`)")
    # HRM runs its modules twice a segment and TRM three times; all but the last of these carry no gradient.
    steps: Count = Field(1, description="loop steps without gradient in each segment, before its one step with "
                                        "gradient; 1 as in HRM, 2 as in TRM")
    halt_weight: NonNegative = Field(0.5, description="weight of the halting head's loss beside the cross-entropy")


class FixedPointConfig(Section):
    """The solver of the core's fixed point under `fixed-point`, and its gradient."""

    solver: Literal["fixed_point_iter", "anderson", "broyden"] = Field(
        "anderson", description="TorchDEQ's solver; broyden keeps 2 * max_steps states")
    max_steps: Depth = Field(24, description="most applications of the core by the solver, and by the implicit "
                                             "gradient's")
    tol: NonNegative = Field(1e-3, description="the solver stops where no sequence's state moves by more than this "
                                               "share of its norm")
    gradient: Literal["phantom", "implicit"] = Field(
        "phantom", description="phantom: through a few damped steps from the fixed point; implicit: the implicit "
                               "function theorem, a second solve in backward")
    phantom_steps: Depth = Field(1, description="steps of the phantom gradient")
    tau: Annotated[Positive, Field(le=1)] = Field(
        1.0, description="share of a phantom step that is new; the rest is the state before it")

    @model_validator(mode="after")
    def _check_steps(self):
        fewest = FEWEST_STEPS[self.solver]
        if self.max_steps < fewest:
            raise ValueError(f"max_steps {self.max_steps} ends solver {self.solver} before its first estimate; set it "
                             f"to {fewest} or more")
        return self
