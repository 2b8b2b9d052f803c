"""Memory of training one block alone, compared with the same layers trained end to end.

    (4 P + R A) L / B    bytes for L layers in B blocks, with P bytes of parameters per layer, and A of activations of
                         each of its R runs in a step (`ModelConfig.layer_runs`)

DiffusionBlocks (arXiv 2506.14202, section 3): weights, gradients, two moments, and saved activations. Each number of
blocks runs in its own process, with and without checkpointed layers, and the processes alternate. For a model that
makes images, a solver step is measured too: it runs only the block that owns the noise level.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from looped.config import Config
from looped.cost.arm_timing import NUM_WARMUP, Arm, Stepper, peak_rss
from looped.cost.arm_timing import serve as serve_steps
from looped.cost.traced_flops import Unvalued, fake_mode, kept_bytes, no_values
from looped.devices import machine, machine_line
from looped.domains import domain_of
from looped.errors import UserError
from looped.models.language import layer_of, rotary_of
from looped.nn.blocks import run_layers
from looped.nn.rows import Rows
from looped.objectives.base import EVERYBODY
from looped.precision import Precision

FIRST = 0
"""The block that is measured; all blocks are of equal size."""
KINDS = ("parameters", "gradients", "optimizer")
NUM_READINGS = 5
"""Timed network evaluations of a batch of images, whose median is the time of a solver step."""


def bench_memory(config: Config, num_blocks: Sequence[int], *, repeats: int = 2, threads: int = 1) -> dict[str, Any]:
    """Bytes needed to train one of N blocks alone, for each N. N = 1 trains all layers end to end, by `ar`, or by
    `denoise` for a model that makes images.

    Returns {"arms": [...], "machine": ...}. An arm has `stack` (the core layers it holds) and `shared` (all other
    parameters), each {parameters, gradients, optimizer}; `saved_activation_bytes` per micro-batch; `peak_rss_bytes` of
    its process in excess of `empty_rss_bytes`, its size before the model was built, with all modules imported;
    `formula_bytes`; `of_twin`, its stack and peak as fractions of the first arm's with the same checkpointing; and for
    a model that makes images `solver_step`, {layers, weight_bytes, seconds} of one network evaluation of a batch.
    Raises UserError for a number of blocks that does not split the layers, and for a process that ends early.
    """
    if not num_blocks:
        raise UserError("bench memory needs at least one number of blocks; give for instance --blocks 1,2,4")
    configs = {(num, checkpointed): memory_config(config, num, checkpointed)
               for num in num_blocks for checkpointed in (False, True)}
    with ExitStack() as stack:
        arms = {key: stack.enter_context(Arm(_name(*key), arm, threads, module=__name__))
                for key, arm in configs.items()}
        for _ in range(NUM_WARMUP):
            for arm in arms.values():
                arm.ask("step")
        rounds = [{key: arm.ask("step")["seconds"] for key, arm in arms.items()} for _ in range(repeats)]
        figures = [{"blocks": num, "checkpointed": checkpointed, **arms[num, checkpointed].ask("figures"),
                    "formula_bytes": formula_bytes(configs[num, checkpointed]),
                    "step_seconds": median(steps[num, checkpointed] for steps in rounds)}
                   for num, checkpointed in arms]
    for arm in figures:
        arm["of_twin"] = _shares(arm, next(a for a in figures if a["checkpointed"] == arm["checkpointed"]))
    return {"arms": figures, "machine": machine(threads)}


def _name(num: int, checkpointed: bool) -> str:
    return ("end to end" if num == 1 else f"1 of {num} blocks") + ", checkpointed" * checkpointed


def memory_config(config: Config, num: int, checkpointed: bool) -> Config:
    """Config that trains one of `num` equal blocks alone, or for `num` 1 all layers end to end. A block trained alone
    leaves the shared parts as they are, unless the config trains them with one block."""
    shared = "frozen" if config.blocks.shared == "trained" else config.blocks.shared
    alone = {"objective": domain_of(config).end_to_end, "blocks.shared": "trained"} if num == 1 else {
        "objective": "blockwise", "blocks.alone": FIRST, "blocks.shared": shared}
    try:
        return config.replace(**alone | {
            "blocks.num": num, "blocks.layers": None, "blocks.edges": None, "blocks.edges_from": None,
            "training.checkpoint_activations": checkpointed, "training.sample_every": 0})
    except UserError as error:
        raise UserError(f"{_name(num, False)}: {str(error).removeprefix('replace(): ')}") from None


def formula_bytes(config: Config) -> int:
    """(4 P + R A) L / B, with P of a plain layer, A the bytes that one more layer keeps for a micro-batch, and R the
    runs of a layer in a step."""
    inputs, mode = domain_of(config).first_inputs(config), fake_mode()
    shape = len(inputs.micro_batches[0]), inputs.num_rows, config.model.width
    with no_values(mode):
        layers = nn.ModuleList(layer_of(config.model, checkpointed=config.training.checkpoint_activations)
                               for _ in range(2))
    angles = rotary_of(config.model)(torch.arange(shape[1])[None])
    rows, x = Rows(mask=EVERYBODY, rotation=angles), Unvalued(mode, shape[0], {}).normal("x", shape[1:])

    def run(num_layers: int) -> Tensor:
        with Precision.of(config, "cpu").autocast():
            return run_layers(layers[:num_layers], x.detach().requires_grad_(), None, rows)

    one, two = (kept_bytes(partial(run, num_layers), layers)[0] for num_layers in (1, 2))
    each = 4 * _bytes(layers[0].parameters()) + config.model.layer_runs * (two - one)
    return round(each * config.model.num_core_layers / config.blocks.num)


def _shares(arm: dict, twin: dict) -> dict[str, Any]:
    return {"stack": sum(arm["stack"].values()) / sum(twin["stack"].values()),
            "peak_rss_bytes": arm["peak_rss_bytes"] / twin["peak_rss_bytes"]}


class MemoryStepper(Stepper):
    """Optimiser steps of one config, and the memory they hold."""

    def figures(self, base: int) -> dict[str, Any]:
        """Measurements that do not vary between steps. `base`: bytes of the process before the model was built."""
        peak, core = peak_rss(), list(self.objective.model.recurrence.core.parameters())
        saved = kept_bytes(self.loss, self.objective)[0]
        self.loss().backward()
        own = {id(parameter) for parameter in core}
        shared = [parameter for parameter in self.objective.parameters() if id(parameter) not in own]
        found = {"stack": self._held(core), "shared": self._held(shared), "saved_activation_bytes": saved,
                 "peak_rss_bytes": peak - base, "empty_rss_bytes": base}
        step = domain_of(self.config).solver_step(self.objective, self.inputs.micro_batches)
        return found | ({} if step is None else {"solver_step": self._solver_step(step)})

    @torch.no_grad()
    def _solver_step(self, step: Callable[[], Tensor]) -> dict[str, Any]:
        seconds = []
        for _ in range(NUM_READINGS):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return {"layers": self.objective.reading_layers, "weight_bytes": _bytes(self.objective.parameters()),
                "seconds": median(seconds)}

    def _held(self, parameters: list[nn.Parameter]) -> dict[str, int]:
        slots = [slot for parameter in parameters for slot in self.optimizer.state[parameter].values()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return dict(zip(KINDS, map(_bytes, (parameters, gradients, slots)), strict=True))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def serve() -> None:
    """Main loop of an arm's process."""
    import torch._dynamo  # noqa: F401 else the first step imports it, and its memory would count as training

    serve_steps(MemoryStepper)


def format_memory(result: dict[str, Any]) -> str:
    """The table of `bench_memory`."""
    heads = "weights", "gradients", "optimizer", "shared", "kept", "(4P+A)L/B", "peak"
    lines = ["MB; shared: weights, gradients and optimiser state outside the stack; kept: for backward; peak: in "
             "excess of a process without a model",
             f"{'':28}" + "".join(f"{head:>10}" for head in heads) + f"{'s/step':>10}   of the first: stack, peak"]
    for arm in result["arms"]:
        figures = [*arm["stack"].values(), sum(arm["shared"].values()), arm["saved_activation_bytes"],
                   arm["formula_bytes"], arm["peak_rss_bytes"]]
        lines.append(f"{_name(arm['blocks'], arm['checkpointed']):28}"
                     + "".join(f"{figure / 1e6:10.1f}" for figure in figures) + f"{arm['step_seconds']:10.2f}"
                     + f"{arm['of_twin']['stack']:20.3f}, {arm['of_twin']['peak_rss_bytes']:.3f}")
    lines += [_solver_line(arm) for arm in result["arms"] if "solver_step" in arm and not arm["checkpointed"]]
    return "\n".join([*lines, machine_line(result["machine"])])


def _solver_line(arm: dict) -> str:
    step = arm["solver_step"]
    return (f"a solver step of {_name(arm['blocks'], False)}: {step['layers']:g} layer{'s' * (step['layers'] != 1)}, "
            f"{step['weight_bytes'] / 1e6:.1f} MB of weights, {step['seconds']:.3f} s/batch")
