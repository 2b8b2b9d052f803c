"""Gaussian noise on the state of a loop before each step, in training and when problems are solved.

    s <- step(s + a * RMS(s) * eps),   eps ~ N(0, I), drawn anew for each step; the RMS is that of each row of s

Noise along the path in training makes the loop return to its path, so that it converges from more starts (Huang, Geng,
Kolter 2026, "Equilibrium Reasoners", EqR, arXiv 2605.21488; models/eqr.py of locuslab/EqR at 4d45856: every application
of the core ends in (1 - 0.95) s + 0.95 f(s) + 0.01 eps, in training and evaluation). Noise at evaluation alone lets a
trained model leave a wrong attractor (Sghaier, Parviz, Jolicoeur-Martineau 2026, "Probabilistic Tiny Recursive Model",
PTRM, arXiv 2605.19943, algorithm 1: z + sigma * eps before each deep recursion; its code is not public, and a
reimplementation, JerMa88/PTRM, takes sigma = 0.3 for sudoku). Both normalise the rows of their states to unit RMS,
which makes an absolute standard deviation relative; `a` is relative for any state. The noise comes before a step, as in
PTRM, so that a readout sees none: EqR's noise after a step is the same path with one more draw at its end. A state of
zeros has no noise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from looped.rng import StepRandom
from looped.tensor_types import Float


class StateNoise:
    """Noise with a standard deviation of `scale` times the RMS of each row, drawn from `random`.

    A sequence's noise depends on (seed, step of training, index of the sequence, its own number of loop steps before)
    alone, so it is the same in any micro-batch and at any depth of the others.
    """

    def __init__(self, scale: float, random: StepRandom):
        self.scale = scale
        self.random = random

    def __call__(self, state: Tensor | tuple[Tensor, ...], step: int | Sequence[int],
                 sequences: Sequence[int] | None = None) -> Tensor | tuple[Tensor, ...]:
        """The state of some `sequences` (None: of all) with the noise of loop step `step`, or of one step for each
        sequence; each tensor of a tuple has its own draws."""
        if isinstance(state, tuple):
            return tuple(self._add(part, step, sequences, f" of part {number}") for number, part in enumerate(state))
        return self._add(state, step, sequences, "")

    def _add(self, state: Float[Tensor, "rows length ..."], step: int | Sequence[int],
             sequences: Sequence[int] | None, part: str) -> Float[Tensor, "rows length ..."]:
        return with_noise(state, self._draw(state, step, sequences, part), self.scale)

    def _draw(self, state: Tensor, step: int | Sequence[int], sequences: Sequence[int] | None, part: str) -> Tensor:
        shape = state.shape[1:]
        if sequences is None:
            return self.random.normal(self._stream(step, part), shape)
        steps = [step] * len(sequences) if isinstance(step, int) else step
        drawn = torch.empty(state.shape, device=state.device)
        for each in sorted(set(steps)):
            places = [place for place, own in enumerate(steps) if own == each]
            some = self.random.of([sequences[place] for place in places])
            drawn[places] = some.normal(self._stream(each, part), shape)
        return drawn

    def _stream(self, step: int, part: str) -> str:
        return f"state noise {step}{part}"


def with_noise(state: Float[Tensor, "rows length ..."], eps: Float[Tensor, "rows length ..."],
               scale: float) -> Float[Tensor, "rows length ..."]:
    """state + scale * RMS(state) * eps, the RMS of each row; no gradient goes through the RMS."""
    rms = state.detach().float().pow(2).mean(-1, keepdim=True).sqrt()
    return state + (scale * rms * eps).to(state.dtype)
