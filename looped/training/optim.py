"""Optimisers, the learning-rate schedule and averaged weights.

Weight decay (decoupled, Loshchilov & Hutter 2019) acts on matrices, but not on vectors or lookup tables: the row of a
rare token gets no gradient, so decay alone would pull it to zero, and the rows of the target table are normalised, so
that decay would only change their step size. Muon (Jordan et al. 2024) trains the matrices of the repeated layers;
embeddings, head, projections of the data and vectors stay with AdamW.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from looped.config.training import OptimConfig
from looped.diffusion.targets import TargetEmbedding

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Device types with a fused AdamW kernel in torch."""

Named = list[tuple[str, nn.Parameter]]


def build_optimizers(module: nn.Module, config: OptimConfig, muon: Callable[..., Optimizer] = Muon) -> list[Optimizer]:
    """AdamW, or AdamW and Muon, over the trainable parameters of `module`; each group stores its peak rate. muon: makes
    the one for the layout of the parameters, called as torch's."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    hidden = hidden_matrices(module) if config.name == "muon" else set()
    rest = [(name, p) for name, p in named if name not in hidden]
    optimizers: list[Optimizer] = [_adamw(module, rest, config)] if rest else []
    if hidden:
        matrices = [(name, p) for name, p in named if name in hidden]
        optimizers.append(muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def _adamw(module: nn.Module, named: Named, config: OptimConfig) -> AdamW:
    decayed = decayed_parameters(module)
    groups = [
        {"params": [(name, p) for name, p in named if name in decayed], "weight_decay": config.weight_decay},
        {"params": [(name, p) for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    # One kernel updates a group, and takes no tensors beside parts of tensors (`training.shard`).
    kinds = {type(p.data) for _, p in named}
    split = [{**group, "params": [(name, p) for name, p in group["params"] if type(p.data) is kind]}
             for group in groups for kind in sorted(kinds, key=str)]
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for _, p in named)
    return AdamW([group for group in split if group["params"]], lr=config.lr, betas=config.betas, fused=fused)


def decayed_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters with weight decay: all matrices but lookup tables."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | TargetEmbedding)}
    return {name for name, p in module.named_parameters() if p.ndim >= 2 and id(p) not in tables}


def hidden_matrices(module: nn.Module) -> set[str]:
    """Names of the matrices Muon may take: 2-D weights of linear maps inside a list of layers or blocks."""
    inside = [m for layers in module.modules() if isinstance(layers, nn.ModuleList) for m in layers.modules()]
    weights = {id(m.weight) for m in inside if isinstance(m, nn.Linear) and m.weight.requires_grad}
    return {name for name, p in module.named_parameters() if id(p) in weights}


def lr_factor(progress: float, step: int, config: OptimConfig) -> float:
    """Fraction of the peak learning rate at optimiser step `step` (from 0), at a fraction `progress` of the budget.

    Linear warmup, counted in steps, multiplies a shape that depends on the fraction of the budget used, in any unit:
    cosine from the start, a linear decay over the last `decay_fraction` (wsd), or flat.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress, floor = min(max(progress, 0.0), 1.0), config.min_lr_fraction
    if config.schedule == "cosine":
        shape = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "wsd" and progress > decay_start(config):
        shape = 1 - (1 - floor) * (progress - (1 - config.decay_fraction)) / config.decay_fraction
    else:
        shape = 1.0
    return warmup * shape


def decay_start(config: OptimConfig) -> float:
    """Fraction of the budget up to which the learning rate does not depend on the size of the budget."""
    return {"cosine": 0.0, "wsd": 1 - config.decay_fraction, "constant": math.inf}[config.schedule]


def set_lr(optimizers: list[Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]


class EMA:
    """Averaged weights: `a <- a + (1 - d)(w - a)` after each step, with d = min(decay, (1 + t) / (10 + t)).

    The growing decay lets an average that is younger than 1 / (1 - decay) steps forget the initial weights. Weights
    without gradient did not change and keep their averages: a block that is active in one step out of N averages over
    its own steps.
    """

    def __init__(self, module: nn.Module, decay: float, local: Callable[[Tensor], Tensor] = Tensor.detach):
        """local: the part of a parameter that this process keeps; the averages are of these parts."""
        self.decay = decay
        self.local = local
        self.names: list[str] = [name for name, _ in module.named_parameters()]
        self.averages: list[Tensor] = [local(p).clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Update the averages with the weights after optimiser step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        moved = [pair for pair in zip(self.averages, module.parameters(), strict=True) if pair[1].grad is not None]
        if moved:
            torch._foreach_lerp_([average for average, _ in moved], [self.local(p) for _, p in moved], 1 - decay)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from saved averages, laid out as the parameters are."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(self.local(tensors[name]))

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Give `module` the averaged weights inside the block."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        """Exchange values in place, one parameter after another."""
        for p, average in zip(module.parameters(), self.averages, strict=True):
            weight = self.local(p)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
