"""A rollout: the way in which a trained model is run at a depth.

    loop      depth steps of the loop                            inference/loop.py
    solver    depth readings of a denoiser, from noise           inference/solver.py, inference/denoised_text.py
    unmask    depth steps in which hidden tokens are shown       inference/unmask.py
    own       what a rule has instead (`Classifier`)             inference/own.py
    pixels    depth solver steps of a denoiser of images         inference/pixels.py

Evaluation, generation, probes and benches ask the rollout of an objective (`rollout_of`) for readouts and for what they
cost; none of them knows the objective. An objective names its rollout by `Objective.rollout`: one of these names, or a
subclass of `Rollout` of one's own, which has the methods that mean something there; the others refuse.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from looped.config import Config
from looped.config.training import EvaluationConfig
from looped.data.batch import Batch
from looped.errors import UserError
from looped.inference.cost import Cost
from looped.inference.exits import Exit
from looped.inference.writing import Writing
from looped.objectives.base import Objective
from looped.rng import StepRandom


class Likelihood(Protocol):
    """`looped.evaluation.likelihood.Likelihood`: figures of all of some sequences, in batches."""

    def by_depth(self, depths: Sequence[int]) -> list[Any]: ...

    def by_level(self, num_levels: int) -> list[tuple[float, Tensor]]: ...

    def limit(self, num_levels: int) -> Tensor: ...


NO_STEPS = "has no steps that a token could leave after; exits on text are of loops"
Readout = tuple[Tensor, Tensor]
"""(latent: a state or an estimate, logits) of all rows of a batch."""


@dataclass(frozen=True)
class Answered:
    """`answers`: the likeliest symbol of each cell. `used`: the steps each problem took, summed over trajectories.
    `layer_forwards`, `evaluations` (NFE): what was run for it."""

    answers: Int[Tensor, "batch length"]
    used: Int[Tensor, "batch"]
    layer_forwards: Float[Tensor, "batch"]
    evaluations: Float[Tensor, "batch"]

    @classmethod
    def by(cls, answers: Int[Tensor, "batch length"], used: Int[Tensor, "runs batch"], cost: Cost) -> "Answered":
        """The answers of runs of a cost that ended after so many steps."""
        return cls(answers, used.sum(0) + len(cost.checks), *cost.spent(used))


class Rollout:
    """The interface of all rollouts; a method raises UserError where it means nothing."""

    name: str
    """The key of tables that differ by rollout."""
    together = False
    """True where one run to the deepest depth gives all depths on its way."""
    next_token = True
    """True where each token has a loss of its own, given those before it."""
    encodes = False
    """True where the state of a row is that of what was read, not of what is sought."""
    hidden_first = 0
    """Rows at the beginning of a document that a prompt of it does not show."""
    latent = "state"
    """The name, in a sentence, of what moves from step to step."""
    tokens_at_once = 1
    """Tokens that are sought together."""

    def __init__(self, objective: Objective):
        self.objective = objective
        self.model: Any = objective.model

    def _refuse(self, does: str) -> NoReturn:
        raise UserError(f"{type(self.objective).__name__} {does}")

    # ---- answers to problems, classes of images

    def answers(self, batch: Batch, depths: Sequence[int], config: EvaluationConfig, random: StepRandom,
                exit: Exit | None = None) -> dict[int, Answered]:
        """Depth -> the answers there; with an `exit`, depth is the most steps that a problem may take."""
        self._refuse("answers no problems")

    def answer_cost(self, depth: int, config: EvaluationConfig, *, early: bool = False) -> Cost:
        """The cost of an answer at a depth. `early`: under an exit, which reads the answer out after every step;
        `Cost.spent` then has what was run of it."""
        self._refuse("answers no problems")

    def steps(self, batch: Batch, depth: int, random: StepRandom, *, start: Any = None) -> Iterator[Readout]:
        """The latent and the readout after each step; `start`: from there instead of from the usual beginning."""
        self._refuse("has no steps")

    def steps_elsewhere(self, batch: Batch, depth: int, random: StepRandom, end: Tensor) -> Iterator[Readout] | None:
        """The same from another start; `end`: the last latent of the first run. None where there is no other."""
        self._refuse("has no steps")

    @property
    def other_start(self) -> str:
        """The start of `steps_elsewhere`, in a sentence."""
        return "other noise"

    def cells(self, batch: Batch) -> Tensor | None:
        """The cells (B, L) whose latents count; None for all."""
        return batch.scored

    # ---- likelihood of texts

    def losses(self, rows: Int[Tensor, "batch length_and_one"], depths: list[int],
               random: StepRandom) -> Iterable[tuple[int, Tensor, float]]:
        """(depth, nats (B, L) of each token, or nats/token (B, 1) of each text, seconds) at ascending depths."""
        self._refuse("has no likelihood by depth")

    def next_tokens(self, rows: Int[Tensor, "batch length_and_one"], depths: list[int],
                    random: StepRandom) -> Iterable[tuple[int, Tensor, Tensor]]:
        """(depth, nats (B, L) of each token but the first, whether (B, L) it is the likeliest) at ascending depths."""
        self._refuse("says no likeliest token; choose a run of --objective ar, or of one that unrolls a loop")

    def likelihood_cost(self, depth: int) -> Cost:
        """The cost of `losses` at a depth."""
        self._refuse("has no likelihood by depth")

    def leave(self, rows: Int[Tensor, "batch length_and_one"], depth: int, exits: Sequence[Exit | None],
              random: StepRandom) -> list[tuple[Float[Tensor, "batch length"], Int[Tensor, "batch length"]]]:
        """For each exit (None: nobody leaves early) the nats of every token where it left, and the steps it took."""
        self._refuse(NO_STEPS)

    def check_exits(self, exits: Sequence[Exit]) -> None:
        """Raises UserError where tokens cannot leave by some exits."""
        self._refuse(NO_STEPS)

    def main(self, likelihood: "Likelihood", depth: int, num_levels: int) -> Float64[Tensor, "num"]:
        """The figure of each sequence that stands for it as a predictor of the next token: its loss at a depth."""
        return likelihood.by_depth([depth])[0].losses

    def levels(self, num: int) -> list[float]:
        """Noise levels at which tokens have losses, from the highest on; none where there are no levels."""
        return []

    def losses_at(self, batch: Batch, level: float, random: StepRandom) -> Float[Tensor, "batch length"]:
        """Nats of each token at one of `levels`."""
        self._refuse("has no noise levels")

    samples = False
    """True where its solver can be sampled as it is, along several trajectories."""

    def sampled_losses(self, rows: Int[Tensor, "batch length_and_one"], depths: list[int], random: StepRandom,
                       num_trajectories: int) -> Iterable[tuple[int, Tensor, float]]:
        """As `losses`, under the mean readout of so many runs of the configured solver."""
        self._refuse("has no solver to sample")

    def sampled_cost(self, depth: int, num_trajectories: int) -> Cost:
        """The cost of `sampled_losses` at a depth."""
        self._refuse("has no solver to sample")

    has_limit = False
    """True where ever more steps have a bound of their own."""

    def limit(self, rows: Int[Tensor, "batch length_and_one"], num_levels: int,
              random: StepRandom) -> Float64[Tensor, "batch"]:
        """The bound of ever more steps, nats/token of each sequence, read at so many levels."""
        self._refuse("has no bound of ever more steps")

    def first_logits(self, batch: Batch, random: StepRandom) -> Float[Tensor, "batch length vocab"]:
        """Logits before anything of what is sought is known: after one step, or at the highest noise level."""
        self._refuse("predicts no tokens")

    # ---- texts, features

    def write(self, prompt: Int[Tensor, "batch length"], num_tokens: int, depth: int, way: Writing) -> Tensor:
        """Continuations of prompts, padded on the left."""
        self._refuse("writes no text")

    def hidden(self, batch: Batch, depth: int,
               noise: Callable[[Tensor], Tensor]) -> Float[Tensor, "batch length width"]:
        """The head's input at a depth; `noise` of the encoded input begins where a start is drawn."""
        self._refuse("has no hidden rows")


ROLLOUTS = {"loop": "looped.inference.loop.LoopRollout", "solver": "looped.inference.solver.SolverRollout",
            "unmask": "looped.inference.unmask.UnmaskRollout", "own": "looped.inference.own.OwnRollout",
            "pixels": "looped.inference.pixels.PixelRollout"}


def rollout_of(objective: Objective) -> Rollout:
    """The rollout of an objective."""
    made = objective.rollout
    if isinstance(made, str):
        module, _, name = ROLLOUTS[made].rpartition(".")
        made = getattr(importlib.import_module(module), name)
    return made(objective)


@torch.no_grad()
def answer(objective: Objective, batch: Batch, depths: Sequence[int], config: Config, *, first: int = 0,
           exit: Exit | None = None) -> dict[int, Answered]:
    """Depth -> the answers there; with an `exit`, depth is the most steps that a problem may take.

    first: the number of the batch's first problem. Every draw depends on the problem's number alone, so that a problem
    is solved the same in any batch, to rounding. Raises UserError for an exit that the model cannot take.
    """
    random = StepRandom(config.seed, 0, start=first, count=len(batch), device=batch.inputs.device)
    return rollout_of(objective).answers(batch, depths, config.evaluation, random, exit)


def at_once(objective: Objective, depths: Sequence[int]) -> list[tuple[int, ...]]:
    """Depths that one run gives together: all of a loop's, each of a solver's alone."""
    depths = sorted(set(depths))
    return [tuple(depths)] if rollout_of(objective).together else [(depth,) for depth in depths]


def trajectories(config: EvaluationConfig) -> list[str]:
    """The prefix of the draws of each of several runs."""
    return [f"trajectory{number} " if number else "" for number in range(config.trajectories)]


def own_normal(random: StepRandom, stream: str, batch: Batch, dim: int) -> Float[Tensor, "batch length dim"]:
    """Standard normal draws for each row of each sequence, which do not depend on how far the batch is filled up."""
    length = batch.targets.shape[1]
    if batch.lengths is None:
        return random.normal(stream, (length, dim))
    rows = [torch.randn((int(real), dim), generator=gen)
            for real, gen in zip(batch.lengths, random.per_row(stream), strict=True)]
    filled = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    return filled.to(random.device)
