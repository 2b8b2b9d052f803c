"""What a config costs before it is run: parameters, FLOPs of an optimiser step, bytes kept for backward.

Closed forms (`flops`, `saved`), so nothing is allocated.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from looped.config import Config
from looped.config.rules import RULES
from looped.diffusion.denoiser import Denoiser
from looped.errors import UserError
from looped.models.build import unseeded
from looped.objectives import objective_class
from looped.objectives.flops import parts_of, picture_of, rows_of
from looped.objectives.saved import WIDE, saved_bytes


@dataclass(frozen=True)
class Counts:
    """`count`'s answer. FLOPs are those of one optimiser step over all its sequences, bytes those of a micro-batch.

    parameters: unique numbers of the objective, its own included. effective_parameters: those of the network that a
    training step would be if it were written out, the core counted once for each pass through it (`Config.main_depth`
    steps, each of one block), or for each of a denoiser's `train_steps`. training_bytes: weights, gradients, optimiser
    state, averaged weights and saved activations.
    """

    parameters: int
    core_parameters: int
    effective_parameters: int
    forward_flops: int
    step_flops: int
    saved_activation_bytes: int
    training_bytes: int


def count(config: Config, vocab_size: int) -> Counts:
    """The counts of a config with a vocabulary of `vocab_size` tokens; random depths enter by their means. Raises
    UserError for a rule of one's own, which has no closed forms."""
    if config.objective not in RULES:
        raise UserError(f"objective {config.objective} has no closed forms of its FLOPs and bytes; those of "
                        f"looped's own rules alone are known")
    with torch.device("meta"):
        denoise = config.denoises
        model = unseeded(config, vocab_size, picture_of(config))
        whole = Denoiser(model, config.denoise) if denoise and not config.generates else model
        if config.is_noprop:
            whole = objective_class(config).from_config(config, model)
    halting = config.model.width + 1 if config.objective == "one-step" else 0
    blocks = {number: model.recurrence.core.blocks[number] for number in config.blocks.held}
    parameters, core = _numel(whole) + halting, sum(map(_numel, blocks.values()))
    work = parts_of(config, vocab_size)
    passes = config.denoise.train_steps if denoise else config.main_depth / config.blocks.num
    if config.objective == "forward-forward":
        passes = 1
    tokens = config.training.batch_size * rows_of(config)
    saved = saved_bytes(config, vocab_size)
    turns = config.one_block_a_step and not config.is_noprop
    shared = parameters - core - sum(p.numel() for p in whole.parameters() if not p.requires_grad)
    learning = {block: not turns or config.blocks.trains_shared(block) for block in config.blocks.held}
    trained = gradients = core + shared * any(learning.values())
    if config.one_block_a_step:  # blocks at rest have none
        gradients = max(_numel(blocks[block]) + shared * learns for block, learns in learning.items())
    around = [] if config.generates else [*model.prelude, *model.coda]
    layers = [*around, *blocks.values()] if any(learning.values()) else blocks.values()
    # AdamW keeps two moments of each weight; Muon one of the matrices it takes, and leaves the others to AdamW.
    moments = 2 * trained - (_matrices(layers) if config.optim.name == "muon" else 0)
    weights = parameters * (1 + (config.optim.ema_decay > 0))
    return Counts(
        parameters=parameters, core_parameters=core,
        effective_parameters=round(parameters + core * (passes - 1)),
        forward_flops=round(tokens * sum(part.flops * (part.no_grad + part.grad) for part in work)),
        step_flops=round(tokens * sum(part.flops * (part.no_grad + 3 * part.grad + part.backward) for part in work)),
        saved_activation_bytes=saved, training_bytes=WIDE * (weights + gradients + moments) + saved)


def format_counts(counts: Counts) -> str:
    """A line a figure."""
    return "\n".join([
        f"parameters              {counts.parameters:,} ({counts.core_parameters:,} in the core)",
        f"effective parameters    {counts.effective_parameters:,} (the core once a mean loop step)",
        f"FLOPs, forward          {counts.forward_flops:.3e} an optimiser step",
        f"FLOPs, with backward    {counts.step_flops:.3e}",
        f"kept for backward       {counts.saved_activation_bytes / 1e6:,.1f} MB a micro-batch",
        f"memory for training     {counts.training_bytes / 1e6:,.1f} MB with weights, gradients and optimiser state"])


def _numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _matrices(layers: Iterable[torch.nn.Module]) -> int:
    """Numbers in the matrices of repeated layers."""
    return sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear))
