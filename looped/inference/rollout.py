"""Rollout: the interface for running a trained model at a given depth.

    loop      depth steps of the loop                            inference/loop_rollout.py
    solver    depth solver steps of a denoiser, from noise       inference/denoiser_rollout.py, text_denoising.py
    unmask    depth steps in which masked tokens are revealed    inference/unmasking_rollout.py
    own       depth as a rule defines it (`Classifier`)          inference/local_rule_rollout.py
    pixels    depth solver steps of a pixel denoiser             inference/image_rollout.py

Evaluation, generation, probes and benchmarks get readouts and their costs from the rollout of an objective
(`rollout_of`), not from the objective itself. `Objective.rollout` is one of these names, or a custom subclass of
`Rollout`, which implements the methods that apply to it; the others raise UserError.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from looped.config import Config
from looped.config.training import EvaluationConfig
from looped.data.batch import Batch
from looped.errors import UserError
from looped.inference.autoregressive import Writing
from looped.inference.choices import Runs, choice_of
from looped.inference.cost import Cost
from looped.inference.exits import Exit
from looped.objectives.base import Objective
from looped.rng import StepRandom
from looped.tensor_types import Float, Float64, Int


class Likelihood(Protocol):
    """Interface of `looped.evaluation.likelihood.Likelihood`: losses of a set of sequences, in batches."""

    def by_depth(self, depths: Sequence[int]) -> list[Any]: ...

    def by_level(self, num_levels: int) -> list[tuple[float, Tensor]]: ...

    def limit(self, num_levels: int) -> Tensor: ...


LOOPS = "full, truncated or another rule that loops"
NO_ANSWERS = "answers no problems; choose a run of puzzles or of image classes"
NO_STEPS = f"has no steps that a problem's latent passes through; choose {LOOPS}, or denoise"
NO_EXITS = f"has no steps after which a token could exit; choose {LOOPS}"
NO_LIKELIHOOD = "has no likelihood by depth; choose a run of text"
NO_SOLVER = "has no solver to sample; choose denoise or blockwise"
Readout = tuple[Tensor, Tensor]
"""(latent: a state or an estimate, logits) of all rows of a batch."""


@dataclass(frozen=True)
class Answered:
    """`answers`: the most likely symbol of each cell. `used`: the steps of each problem, summed over trajectories.
    `layer_forwards`, `evaluations` (NFE): the cost of each problem, of all trajectories. `tried`: the answers of the
    trajectories, None if there is only one."""

    answers: Int[Tensor, "batch length"]
    used: Int[Tensor, "batch"]
    layer_forwards: Float[Tensor, "batch"]
    evaluations: Float[Tensor, "batch"]
    tried: Int[Tensor, "runs batch length"] | None = None

    @classmethod
    def of(cls, runs: Runs, choose: str, cost: Cost) -> "Answered":
        """The answers of one trajectory, or those chosen among several (`evaluation.choose`)."""
        tried = runs.answers if len(runs.logits) > 1 else None
        answers = runs.answers[0] if tried is None else choice_of(choose).answer(runs)
        return cls(answers, runs.used.sum(0) + len(cost.checks), *cost.spent(runs.used), tried)


class Rollout:
    """Interface of all rollouts; a method that does not apply raises UserError."""

    name: str
    """Key in tables that differ by rollout."""
    together = False
    """True if one run to the deepest depth gives all depths on the way."""
    next_token = True
    """True if each token has its own loss, given those before it."""
    encodes = False
    """True if the state of a row encodes the tokens read, not the one to predict."""
    hidden_first = 0
    """Number of rows at the beginning of a document that stay hidden in a prompt."""
    latent = "state"
    """Name of the latent in sentences."""
    tokens_at_once = 1
    """Number of tokens predicted together."""

    def __init__(self, objective: Objective):
        self.objective = objective
        self.model: Any = objective.model

    def _refuse(self, does: str) -> NoReturn:
        raise UserError(f"objective {self.objective.setting or type(self.objective).__name__} {does}")

    # ---- answers to problems, classes of images

    def answers(self, batch: Batch, depths: Sequence[int], config: EvaluationConfig, random: StepRandom,
                exit: Exit | None = None) -> dict[int, Answered]:
        """Depth -> its answers; with an `exit`, depth is the maximum number of steps of a problem."""
        self._refuse(NO_ANSWERS)

    def answer_cost(self, depth: int, config: EvaluationConfig, *, early: bool = False) -> Cost:
        """The cost of an answer at a depth. `early`: with an exit, which needs a readout after every step; `Cost.spent`
        then gives the part that was run."""
        self._refuse(NO_ANSWERS)

    def steps(self, batch: Batch, depth: int, random: StepRandom, *, start: Any = None) -> Iterator[Readout]:
        """The latent and the readout after each step; `start` replaces the usual start."""
        self._refuse(NO_STEPS)

    def steps_elsewhere(self, batch: Batch, depth: int, random: StepRandom, end: Tensor) -> Iterator[Readout] | None:
        """`steps` from another start; `end`: the last latent of the first run. None if there is no other start."""
        self._refuse(NO_STEPS)

    @property
    def other_start(self) -> str:
        """Phrase for the start of `steps_elsewhere`."""
        return "other noise"

    def cells(self, batch: Batch) -> Tensor | None:
        """Mask (B, L) of the cells whose latents count; None for all."""
        return batch.scored

    # ---- likelihood of texts

    def losses(self, rows: Int[Tensor, "batch length_and_one"], depths: list[int],
               random: StepRandom) -> Iterable[tuple[int, Tensor, float]]:
        """(depth, nats (B, L) of each token, or nats/token (B, 1) of each text, seconds) at ascending depths."""
        self._refuse(NO_LIKELIHOOD)

    def next_tokens(self, rows: Int[Tensor, "batch length_and_one"], depths: list[int],
                    random: StepRandom) -> Iterable[tuple[int, Tensor, Tensor]]:
        """(depth, nats (B, L) of each token but the first, mask (B, L) of argmax tokens) at ascending depths."""
        self._refuse(f"gives no most likely token; choose ar, {LOOPS}, or denoise")

    def likelihood_cost(self, depth: int) -> Cost:
        """The cost of `losses` at a depth."""
        self._refuse(NO_LIKELIHOOD)

    def leave(self, rows: Int[Tensor, "batch length_and_one"], depth: int, exits: Sequence[Exit | None],
              random: StepRandom) -> list[tuple[Float[Tensor, "batch length"], Int[Tensor, "batch length"]]]:
        """For each exit (None: no early exit) the nats of every token at its exit, and the steps it took."""
        self._refuse(NO_EXITS)

    def check_exits(self, exits: Sequence[Exit]) -> None:
        """Raises UserError if tokens cannot use one of the exits."""
        self._refuse(NO_EXITS)

    def main(self, likelihood: "Likelihood", depth: int, num_levels: int) -> Float64[Tensor, "num"]:
        """Nats/token of each sequence as a next-token predictor: the loss at `depth`."""
        return likelihood.by_depth([depth])[0].losses

    def levels(self, num: int) -> list[float]:
        """Noise levels at which tokens have losses, highest first; empty if there are none."""
        return []

    known_at_start = 0.0
    """Nats/token that the input at the highest of `levels` can say of a token, which `main` adds."""

    def losses_at(self, batch: Batch, level: float, random: StepRandom) -> Float[Tensor, "batch length"]:
        """Nats of each token at one of `levels`."""
        self._refuse("has no noise levels; choose denoise or blockwise")

    samples = False
    """True if its configured solver can be sampled along several trajectories."""

    def sampled_losses(self, rows: Int[Tensor, "batch length_and_one"], depths: list[int], random: StepRandom,
                       num_trajectories: int) -> Iterable[tuple[int, Tensor, float]]:
        """`losses` under the mean readout of `num_trajectories` runs of the configured solver."""
        self._refuse(NO_SOLVER)

    def sampled_cost(self, depth: int, num_trajectories: int) -> Cost:
        """The cost of `sampled_losses` at a depth."""
        self._refuse(NO_SOLVER)

    has_limit = False
    """True if there is a bound in the limit of infinitely many steps."""

    def limit(self, rows: Int[Tensor, "batch length_and_one"], num_levels: int,
              random: StepRandom) -> Float64[Tensor, "batch"]:
        """Bound in the limit of infinitely many steps: nats/token of each sequence, measured at `num_levels` levels."""
        self._refuse("has no bound in the limit of infinitely many steps; choose masked")

    def first_logits(self, batch: Batch, random: StepRandom) -> Float[Tensor, "batch length vocab"]:
        """Logits before anything of the targets is known: after one step, or at the highest noise level."""
        self._refuse(f"predicts no token from those before it alone; choose ar, {LOOPS}, or denoise")

    # ---- texts, features

    def write(self, prompt: Int[Tensor, "batch length"], num_tokens: int, depth: int, way: Writing) -> Tensor:
        """Continuations of prompts, padded on the left."""
        self._refuse("writes no text; choose a run of text")

    def hidden(self, batch: Batch, depth: int,
               noise: Callable[[Tensor], Tensor]) -> Float[Tensor, "batch length width"]:
        """The head's input at a depth; a random start is `noise(encoded input)`."""
        self._refuse(f"has no hidden rows at a depth; choose ar, {LOOPS}, or denoise")


ROLLOUTS = {"loop": "looped.inference.loop_rollout.LoopRollout",
            "solver": "looped.inference.denoiser_rollout.SolverRollout",
            "unmask": "looped.inference.unmasking_rollout.UnmaskRollout",
            "own": "looped.inference.local_rule_rollout.OwnRollout",
            "pixels": "looped.inference.image_rollout.PixelRollout"}


def rollout_of(objective: Objective) -> Rollout:
    """The rollout of an objective. Raises UserError if its `rollout` is neither a name nor a class."""
    made = getattr(objective, "rollout", None)
    if not callable(made) and made not in ROLLOUTS:
        names = ", ".join(sorted(ROLLOUTS))
        raise UserError(f"{type(objective).__name__}.rollout is {made!r}; set it to {names}, or to a subclass of "
                        f"looped.inference.rollout.Rollout")
    if isinstance(made, str):
        module, _, name = ROLLOUTS[made].rpartition(".")
        made = getattr(importlib.import_module(module), name)
    return made(objective)


@torch.no_grad()
def answer(objective: Objective, batch: Batch, depths: Sequence[int], config: Config, *, first: int = 0,
           exit: Exit | None = None) -> dict[int, Answered]:
    """Depth -> its answers; with an `exit`, depth is the maximum number of steps of a problem.

    first: index of the batch's first problem. Random draws depend on a problem's index alone, so it is solved the same
    in any batch, up to rounding. Raises UserError for an exit that the model does not support.
    """
    random = StepRandom(config.seed, 0, start=first, count=len(batch), device=batch.inputs.device)
    return rollout_of(objective).answers(batch, depths, config.evaluation, random, exit)


def at_once(objective: Objective, depths: Sequence[int]) -> list[tuple[int, ...]]:
    """Depths grouped by run: for a loop all together, for a solver each alone."""
    depths = sorted(set(depths))
    return [tuple(depths)] if rollout_of(objective).together else [(depth,) for depth in depths]
