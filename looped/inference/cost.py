"""The cost of inference: network evaluations (NFE) and layer passes of one sequence, as each rollout states them.

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
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
