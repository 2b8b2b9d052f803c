"""The fixed point of the core, found by a solver and differentiated without unrolling (deep equilibrium models).

    s* = step(s*, e);   implicit: dL/dtheta = (dL/ds*) (I - df/ds)^-1 df/dtheta   (Bai et al. 2019, arXiv 1909.01377)
                        phantom:  the gradient through k steps s <- tau f(s) + (1 - tau) s from s* (Geng et al. 2021,
                                  arXiv 2111.05177)

Solvers and gradients come from TorchDEQ (Geng & Kolter 2023, arXiv 2310.18605), the extra `deq`. Nothing forces the
core to be a contraction; if it is not one, the solver stops after `max_steps` and returns the best state so far. A
solver runs until the slowest sequence of its micro-batch has converged. So, for this rule only, splitting a batch
differently changes a sequence's results, within `tol`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from looped.config import Config
from looped.config.recurrence import FixedPointConfig, RecurrenceConfig
from looped.data.batch import Batch
from looped.devices import widest
from looped.errors import UserError
from looped.models.language import LanguageModel
from looped.objectives.base import Loss, Objective
from looped.objectives.bptt import Unrolled
from looped.objectives.head_start import HEAD_STARTS, NoHeadStart
from looped.objectives.rule_depths import fixed_point_steps, implicit_steps
from looped.rng import StepRandom
from looped.tensor_types import Int

Map = Callable[[Tensor], Tensor]
"""State -> next state."""


class FixedPoint(Unrolled):
    """The loss at the fixed point. metrics: `residual`, the change of the state in one more step relative to its norm,
    `num_steps`, the applications of the core by the solver, and those of a head start."""

    changes = "the solver stops by the residual"

    def disturb(self, random: StepRandom) -> None:
        """No noise: a map with new noise at each application has no fixed point."""

    @classmethod
    def from_config(cls, config: Config, model: nn.Module) -> Objective:
        return cls(model, config.recurrence, config.fixed_point)

    @classmethod
    def trained_depths(cls, config: Config) -> tuple[int, int]:
        """(smallest, largest) number of solver steps: any of them may be the last."""
        return 1, config.main_depth

    def __init__(self, model: LanguageModel, config: RecurrenceConfig, fixed_point: FixedPointConfig):
        super().__init__(model, config)
        self.fixed_point = fixed_point
        self.equilibrium: Equilibrium = Equilibrium(fixed_point)
        self.head_start: NoHeadStart = HEAD_STARTS[fixed_point.head_start](fixed_point)

    def forward(self, tokens: Int[Tensor, "batch length_and_one"] | Batch, random: StepRandom) -> Loss:
        start = self.start(tokens, random)

        def step(state: Tensor) -> Tensor:
            return self.model.step(state, start.e, None, start.rows)

        def read(state: Tensor) -> Tensor:
            return self.read_out(state, start.batch, start.rows).mean()

        proposal = self.head_start.proposal(step, self.model.initial_state(start.e, start.noise))
        state = self.equilibrium(step, proposal)
        value, metrics = self.head_start.joined(read(state), proposal, state, read)
        return Loss(value, {"loss": value.detach(), "num_steps": float(self.equilibrium.num_steps),
                            "residual": self.equilibrium.residual} | metrics)

    def expected_depths(self) -> tuple[float, float]:
        """Applications of the core: (by the solver, at most; with gradient)."""
        no_grad, grad = fixed_point_steps(self.fixed_point)
        return no_grad, grad + self.head_start.passes

    def without_values(self) -> None:
        plain = self.fixed_point.model_copy(update={"solver": "fixed_point_iter"})
        self.equilibrium.config, self.equilibrium.solver = plain, _all_steps

    def after_step(self) -> None:
        self.equilibrium.settle_accounts()

    def layer_forwards(self) -> float:
        """The measured cost of the last optimiser step: solver steps really run in forward and backward, over all
        processes. Before the first optimiser step, the upper bound."""
        core, passes = self.equilibrium.mean_cost, self.head_start.passes
        if core is None:
            no_grad, grad = fixed_point_steps(self.fixed_point)
            core = no_grad + 3 * grad + implicit_steps(self.fixed_point)
        return (core + 3 * passes) * sum(self.model.core_layers) + self.cost(0, 0, readings=1 + passes)


class Equilibrium:
    """Callable from a map and an initial state to the map's fixed point, with the configured gradient.

    num_steps: applications of the map by the solver in the last call. residual: mean change of a state in one more
    application, relative to its norm, in the last call. mean_cost: applications of the map per call in the last
    optimiser step, averaged over calls and processes; one with gradient counts three, and one of backward's solver (a
    product with the transposed Jacobian) counts one. Raises UserError if TorchDEQ is not installed.
    """

    def __init__(self, config: FixedPointConfig):
        try:
            from torchdeq.grad import backward_factory
            from torchdeq.solver import get_solver
        except ImportError:
            raise UserError("objective fixed-point takes its solvers from torchdeq, which is not installed; run: "
                            "pip install 'looped[deq]'") from None
        self.config = config
        self.solver: Any = get_solver(config.solver)
        kind = "ift" if config.gradient == "implicit" else config.phantom_steps
        self.differentiate: Any = backward_factory(grad_type=kind, tau=config.tau, b_solver=self._solve_backward)
        self.num_steps: int = 0
        self.residual: Tensor = torch.zeros(())
        self.mean_cost: float | None = None
        self._pending: list[float] = []

    def __call__(self, step: Map, state: Tensor) -> Tensor:
        f = _in_one_precision(step, state)
        with torch.no_grad():
            state, info, self.num_steps = self._solve(f, state.to(torch.promote_types(state.dtype, torch.float32)))
        self.residual = info["rel_lowest"].mean()
        if torch.is_grad_enabled():
            self._pending.append(self.num_steps + 3.0 * fixed_point_steps(self.config)[1])
        return self.differentiate(None, f, state.detach())[-1]

    def _solve(self, f: Map, state: Tensor) -> tuple[Tensor, dict, int]:
        """(fixed point, TorchDEQ's info, number of applications of f).

        The solver's linear algebra is in float64 if the device has it. Anderson's method solves with the inner products
        of the last changes and adds 1e-4 to their diagonal; for long states float32 rounds this away, and the matrix
        becomes singular.
        """
        num_steps, wide = 0, widest(state.device)

        def counted(s: Tensor) -> Tensor:
            nonlocal num_steps
            num_steps += 1
            return f(s.to(state.dtype)).to(s.dtype)

        # Broyden's method applies f once before it counts.
        most = self.config.max_steps - (self.config.solver == "broyden")
        with torch.autocast(state.device.type, enabled=False):
            found, _, info = self.solver(counted, state.to(wide), max_iter=most, tol=self.config.tol, stop_mode="rel")
        return found.to(state.dtype), info, num_steps

    def _solve_backward(self, f: Map, grad: Tensor) -> tuple[Tensor, list, dict]:
        """The solve in backward, called by TorchDEQ after one more application of the map."""
        found, info, num_steps = self._solve(f, grad)
        self._pending[-1] += 1 + num_steps
        return found, [], info

    def settle_accounts(self) -> None:
        """Update `mean_cost` from the calls since the last update; every process calls it once per optimiser step."""
        sums = torch.tensor([sum(self._pending), len(self._pending)], dtype=torch.float64)
        self._pending = []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = sums.to(self.residual.device)  # the device of collective operations
            torch.distributed.all_reduce(sums)
        cost, calls = sums.tolist()
        self.mean_cost = cost / calls if calls else self.mean_cost


def _all_steps(f: Map, state: Tensor, max_iter: int, tol: float,
               stop_mode: str) -> tuple[Tensor, list, dict[str, Tensor]]:
    """Replacement for a solver of TorchDEQ: `max_iter` applications of the map, converged or not."""
    for _ in range(max_iter):
        state = f(state)
    return state, [], {"rel_lowest": state.new_zeros(len(state))}


def _in_one_precision(step: Map, state: Tensor) -> Callable[..., Tensor]:
    """The map for the solvers: output in the dtype of its input, with the current autocast inside, in backward too.
    `tau` below 1 damps it."""
    device = state.device.type
    enabled, narrow = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def f(s: Tensor, tau: float = 1.0) -> Tensor:
        with torch.autocast(device, narrow, enabled=enabled):
            new = step(s).to(s.dtype)
        return new if tau == 1 else tau * new + (1 - tau) * s

    return f
