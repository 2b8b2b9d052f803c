"""Cost of a config before it is run: parameters, FLOPs per optimiser step, bytes kept for backward."""

from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean

from torch import Tensor, nn

from looped.config import Config
from looped.cost.traced_flops import FakeTraining, flops_of
from looped.data.batch import Batch
from looped.domains import domain_of
from looped.training.optim import build_optimizers, hidden_matrices

WIDE = 4
"""Bytes per float32, the dtype of weights, gradients and optimiser state."""


@dataclass(frozen=True)
class Counts:
    """Counts of a config. FLOPs are per optimiser step over all its sequences, bytes per micro-batch.

    parameters: unique parameters of the objective, including those outside its model. effective_parameters: parameters
    of the unrolled network of a training step, with the core counted once per pass (`Rule.passes`, times the
    `ModelConfig.layer_runs` of each). dtype: that of matrix products, on the device that training would take.
    training_bytes: weights, gradients, optimiser state, averaged weights and saved activations. again_flops: of layers
    that are computed again in backward; update_flops: of Muon's own matrix products; neither is in step_flops.
    checkpoint_bytes: tensors of a checkpoint. trained, gradients, moments, matrices: numbers of elements, of the
    weights that are trained at all, of those that a step trains, of the optimiser's state, and of what Muon trains.
    tokens, layer_forwards: per sequence of an optimiser step.
    """

    parameters: int
    core_parameters: int
    effective_parameters: int
    forward_flops: int
    step_flops: int
    again_flops: int
    update_flops: int
    dtype: str
    saved_activation_bytes: int
    training_bytes: int
    checkpoint_bytes: int
    trained: int
    gradients: int
    moments: int
    matrices: int
    tokens: float
    layer_forwards: float


def count(config: Config, vocab_size: int) -> Counts:
    """Counts of a config with a vocabulary of `vocab_size` tokens, from steps on fake tensors. Random decisions of a
    rule, such as a depth or a block, enter by their mean (`Objective.decisions`); several typical micro-batches by the
    mean of their FLOPs and the most that one keeps."""
    inputs = replace(domain_of(config).typical_inputs(config), vocab_size=vocab_size)
    training, plain = FakeTraining(config, inputs), config
    objective, core = training.objective, training.objective.model.recurrence.core
    learning = [p for p in objective.parameters() if p.requires_grad]
    trained, parts = sum(p.numel() for p in learning), inputs.micro_batches
    hidden = hidden_matrices(objective) if config.optim.name == "muon" else set()
    matrices = sum(p.numel() for name, p in objective.named_parameters() if name in hidden)
    moments = 2 * trained - matrices  # AdamW keeps two of each weight, Muon one
    by_part = [[(weight / len(parts), training.step(part, decisions)) for weight, decisions in objective.decisions()]
               for part in parts]
    kept = round(len(parts) * max(sum(weight * cost.kept for weight, cost in costs) for costs in by_part))
    costs = list(chain.from_iterable(by_part))
    gradients = max(cost.gradients for _, cost in costs)
    update = sum(flops_of(optimizer.step) for optimizer in build_optimizers(objective, config.optim))
    done = sum(weight * (cost.forward_flops + cost.backward_flops) for weight, cost in costs)
    if config.training.checkpoint_activations:  # FLOPs without recomputed layers
        plain = FakeTraining(config.replace(**{"training.checkpoint_activations": False}), inputs)
        costs = [(weight / len(parts), plain.step(part, decisions))
                 for part in parts for weight, decisions in plain.objective.decisions()]
    forward = config.training.accumulation * sum(weight * cost.forward_flops for weight, cost in costs)
    backward = config.training.accumulation * sum(weight * cost.backward_flops for weight, cost in costs)
    parameters, averages = _numel(objective), config.optim.ema_decay > 0
    passes = config.rule.passes(config) * config.model.layer_runs
    return Counts(
        parameters=parameters, core_parameters=_numel(core),
        effective_parameters=round(parameters + _numel(core) * (passes - 1)),
        forward_flops=round(forward), step_flops=round(forward + backward),
        again_flops=round(config.training.accumulation * done - forward - backward), update_flops=update,
        dtype=training.precision.dtype, saved_activation_bytes=kept,
        training_bytes=WIDE * (parameters * (1 + averages) + gradients + moments) + kept,
        checkpoint_bytes=_state_bytes(objective) * (1 + averages) + WIDE * moments,
        trained=trained, gradients=gradients, moments=moments, matrices=matrices,
        tokens=fmean((Batch.of(part) if isinstance(part, Tensor) else part).num_tokens / len(part) for part in parts),
        layer_forwards=objective.layer_forwards())


def format_counts(counts: Counts) -> str:
    """The counts as text, one per line."""
    return "\n".join([
        f"parameters              {counts.parameters:,} ({counts.core_parameters:,} in the core)",
        f"effective parameters    {counts.effective_parameters:,} (the core once per run in a step of training)",
        f"FLOPs, forward          {counts.forward_flops:.3e} per optimiser step",
        f"FLOPs, with backward    {counts.step_flops:.3e}",
        f"kept for backward       {counts.saved_activation_bytes / 1e6:,.1f} MB per micro-batch"
        + f" in {counts.dtype}" * (counts.dtype != "fp32"),
        f"memory for training     {counts.training_bytes / 1e6:,.1f} MB with weights, gradients and optimiser state"])


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _state_bytes(module: nn.Module) -> int:
    """Bytes of a module's state, a tied tensor once."""
    unique = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in unique.values())
