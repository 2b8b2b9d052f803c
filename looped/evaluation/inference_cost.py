"""The cost of inference: network evaluations (NFE) and layer passes of one sequence, for every way to run a model.

    a loop of n steps            prelude + n x core + coda (by an exit: a coda after every step)
    the bound of n levels        prelude + clean rows + n x (core + coda)
    a solver of n steps          prelude + clean rows + its evaluations x (core + coda); Heun's has 2 n - 1
    n unmasking steps            n x (prelude + core + coda)
    NoProp, n steps              prelude + n x (core + coda)
    Forward-Forward, n layers    classes x n
    n solver steps of an image   its evaluations x core

The core is the block of the core that is at work: the next one in a loop, the owner of the noise level in a solver.
Guidance evaluates the network twice, several trajectories share the prelude and the clean rows, and each is checked
`NUM_CHECKS` times under `evaluation.choose consistent`. A layer pass is one call of a layer for one sequence; keys and
values that are recorded alone (`denoise.context context`) are none.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import singledispatch

import torch
from jaxtyping import Float, Int
from torch import Tensor

from looped.config.training import EvaluationConfig
from looped.diffusion.schedules import block_schedule
from looped.diffusion.solve import evaluated_levels
from looped.evaluation.masked_bound import step_levels
from looped.objectives.base import Objective
from looped.objectives.bptt import Unrolled
from looped.objectives.denoise import Denoise
from looped.objectives.masked import Masked
from looped.objectives.pixels import DenoisePixels
from looped.objectives.rivals.forward_forward import ForwardForward
from looped.objectives.rivals.noprop import NoProp

NUM_CHECKS = 4
"""Fresh noisings of an answer that its self-consistency is a mean over."""


@dataclass(frozen=True)
class Cost:
    """The cost of one sequence. before: layers that run once. readings: the layers of each reading of one run, in
    order. runs: how often those are gone through. networks: network evaluations of a reading. checks: the layers of
    evaluations at the end of all runs. together: sequences that have left early are read along with the others."""

    before: float
    readings: tuple[float, ...]
    runs: int = 1
    networks: int = 1
    checks: tuple[float, ...] = ()
    together: bool = False

    @property
    def evaluations(self) -> int:
        """Network evaluations (NFE)."""
        return self.runs * len(self.readings) * self.networks + len(self.checks)

    @property
    def layer_forwards(self) -> float:
        """Forward passes of one layer."""
        return float(self.before + self.runs * sum(self.readings) + sum(self.checks))

    def fields(self) -> dict[str, float]:
        """The columns of a row."""
        return {"layer_forwards": self.layer_forwards, "evaluations": self.evaluations}

    def spent(self, used: Int[Tensor, "runs batch"]) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        """(layer passes, network evaluations) of each sequence of a batch whose runs ended after so many readings; on
        the processor."""
        used = used.cpu()
        read = used.amax(1, keepdim=True).expand_as(used) if self.together else used
        until = torch.tensor([0.0, *itertools.accumulate(self.readings)], dtype=torch.float64)
        return (self.before + until[read].sum(0) + sum(self.checks),
                (read.sum(0) * self.networks + len(self.checks)).double())


# ---- likelihood ------------------------------------------------------------------------------------------------------


@singledispatch
def likelihood_cost(objective: Objective, depth: int) -> Cost:
    """The cost of `nats_per_token` at a depth: a loop of so many steps, or the variational bound of so many levels."""
    raise TypeError(f"{type(objective).__name__} has no likelihood by depth")


@likelihood_cost.register
def _(objective: Unrolled, depth: int) -> Cost:
    return _loop(objective, depth)


@likelihood_cost.register
def _(objective: Masked, depth: int) -> Cost:
    around = _prelude(objective) + _coda(objective)
    layers = objective.model.core_layers
    owners = objective.owners(step_levels(objective, depth)[:-1]).tolist()
    return Cost(0, tuple(around + layers[block] for block in owners))


@likelihood_cost.register
def _(objective: Denoise, depth: int) -> Cost:
    c = objective.config
    levels = block_schedule(c.schedule, depth, objective.noise, c.block_size, c.order)
    return Cost(_before(objective), tuple(_readings(objective, levels[:, 0])))


def solver_likelihood_cost(objective: Denoise, depth: int, num_trajectories: int) -> Cost:
    """The cost of `nats_by_solver`: trajectories of the configured solver under teacher forcing, beside which `inject`
    reads the noised truth."""
    networks = 2 if objective.config.context == "inject" else 1
    return Cost(_before(objective), _solver(objective, depth, networks), runs=num_trajectories, networks=networks)


# ---- answers ---------------------------------------------------------------------------------------------------------


@singledispatch
def answer_cost(objective: Objective, depth: int, config: EvaluationConfig, *, early: bool = False) -> Cost:
    """The cost of an answer to a problem, or of naming the class of an image, at a depth. `early`: under an exit, which
    reads the answer out after every step; `Cost.spent` then has what was run of it."""
    raise TypeError(f"{type(objective).__name__} answers no problems")


@answer_cost.register
def _(objective: Unrolled, depth: int, config: EvaluationConfig, *, early: bool = False) -> Cost:
    return _loop(objective, depth, early=early)


@answer_cost.register
def _(objective: Denoise, depth: int, config: EvaluationConfig, *, early: bool = False) -> Cost:
    networks = 1 if objective.config.guidance == 1 else 2
    checks: list[float] = []
    if config.choose == "consistent" and config.trajectories > 1:
        middle = torch.tensor([check_level(objective)], dtype=torch.float64)
        checks = _readings(objective, middle) * (NUM_CHECKS * config.trajectories)
    return Cost(_before(objective), _solver(objective, depth, networks), runs=config.trajectories, networks=networks,
                checks=tuple(checks), together=objective.config.context != "inject")


@answer_cost.register
def _(objective: NoProp, depth: int, config: EvaluationConfig, *, early: bool = False) -> Cost:
    steps = _taken_in_turn(objective, objective.num_steps(depth))
    return Cost(config.trajectories * _prelude(objective), tuple(core + _coda(objective) for core in steps),
                runs=config.trajectories)


@answer_cost.register
def _(objective: ForwardForward, depth: int, config: EvaluationConfig, *, early: bool = False) -> Cost:
    classes = objective.model.vocab_size
    return Cost(0, (float(classes * min(depth, len(objective.layers))),), runs=config.trajectories, networks=classes)


def check_level(objective: Denoise) -> float:
    """The noise level at which an answer's self-consistency is read: the geometric middle."""
    return (objective.noise.sigma_min * objective.noise.sigma_max) ** 0.5


# ---- images ----------------------------------------------------------------------------------------------------------


def image_cost(objective: DenoisePixels, depth: int, guidance: float = 1.0) -> Cost:
    """The cost of one image that the configured solver makes in so many steps."""
    networks = 1 if guidance == 1 else 2
    levels = torch.tensor(evaluated_levels(objective.config, objective.noise, depth), dtype=torch.float64)
    layers = objective.model.core_layers
    return Cost(0, tuple(networks * layers[block] for block in objective.denoiser.owners(levels).tolist()),
                networks=networks)


# ---- parts -----------------------------------------------------------------------------------------------------------


def _prelude(objective: Objective) -> int:
    return objective.model.config.num_prelude_layers


def _coda(objective: Objective) -> int:
    return objective.model.config.num_coda_layers


def _taken_in_turn(objective: Objective, num_steps: int) -> Iterable[int]:
    """Layers of the core at each step of a loop, which takes its blocks in turn."""
    return itertools.islice(itertools.cycle(objective.model.core_layers), num_steps)


def _loop(objective: Unrolled, depth: int, *, early: bool = False) -> Cost:
    steps, coda = _taken_in_turn(objective, depth), _coda(objective)
    if early:
        return Cost(_prelude(objective), tuple(core + coda for core in steps))
    return Cost(_prelude(objective) + coda, tuple(steps))


def _before(objective: Denoise) -> int:
    """The preludes, and the clean rows of `concat` on their way through each block and all of the coda but its last
    layer, of which keys and values are enough."""
    blocks = objective.model.core_layers
    clean = sum(blocks) + len(blocks) * max(_coda(objective) - 1, 0)
    return _prelude(objective) + (clean if objective.config.context == "concat" else 0)


def _solver(objective: Denoise, depth: int, networks: int) -> tuple[float, ...]:
    levels = evaluated_levels(objective.config, objective.noise, depth)
    # Where rows have levels of their own there is one block, which owns all of them.
    highest = torch.stack([torch.as_tensor(level, dtype=torch.float64).max() for level in levels])
    return tuple(networks * layers for layers in _readings(objective, highest))


def _readings(objective: Denoise, levels: Float[Tensor, "readings"]) -> list[float]:
    """Layers of a reading at each level, by the block that owns it."""
    layers = objective.model.core_layers
    owners = [0] * len(levels) if objective.denoiser.edges is None else objective.denoiser.owners(levels).tolist()
    return [float(layers[block] + _coda(objective)) for block in owners]
