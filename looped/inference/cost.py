"""Cost of inference: network evaluations (NFE) and layer passes per sequence, as each rollout reports them.

    a loop of n steps            prelude + n x core + coda (with an exit: a coda after every step)
    the bound of n levels        prelude + clean rows + n x (core + coda)
    a solver of n steps          prelude + clean rows + its evaluations x (core + coda); Heun's has 2 n - 1
    n unmasking steps            n x (prelude + core + coda)
    NoProp, n steps              prelude + n x (core + coda)
    Forward-Forward, n layers    classes x n
    n solver steps of an image   its evaluations x core

"core" is the active block of the core: the next one in a loop, the owner of the noise level in a solver. Guidance
evaluates the network twice. Several trajectories share the prelude and the clean rows, and each is checked `NUM_CHECKS`
times under `evaluation.choose consistent`. A layer pass is one call of a layer for one sequence; computing only keys
and values (`denoise.context context`) does not count.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from looped.tensor_types import Float, Int

NUM_CHECKS = 8
"""Number of second readings of an answer (`looped.diffusion.second_reading`)."""


@dataclass(frozen=True)
class Cost:
    """The cost of one sequence. before: layers that run once. readings: layers of each loop step or solver evaluation
    of one run, in order. runs: number of runs. networks: network evaluations per reading. checks: layers of each
    evaluation after all runs. together: True if sequences that exited early are still evaluated with the others."""

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
        """(layer passes, network evaluations) of each sequence of a batch, on the CPU. used: readings of each run."""
        used = used.cpu()
        read = used.amax(1, keepdim=True).expand_as(used) if self.together else used
        until = torch.tensor([0.0, *itertools.accumulate(self.readings)], dtype=torch.float64)
        return (self.before + until[read].sum(0) + sum(self.checks),
                (read.sum(0) * self.networks + len(self.checks)).double())
