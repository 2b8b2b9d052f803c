"""FLOP/s of a model's training compared with those of matrix products on the same processor."""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from looped.config import Config
from looped.config.rules import RULES
from looped.cost.arm_timing import NUM_WARMUP, Stepper
from looped.cost.bench_step import at_mean_depth
from looped.cost.traced_flops import flops_of, kept_bytes
from looped.devices import machine, machine_line
from looped.errors import UserError, did_you_mean
from looped.nn.cast_once import casts_kept
from looped.nn.rows import Rows
from looped.objectives.base import rows_of_batch
from looped.precision import Precision
from looped.rng import generator

TIMED = RULES["truncated"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HUGINN_LAYER_BYTES = 63.6e6 / 1024
"""Bytes per token that a layer of width 512, 8 heads and SwiGLU of 2,048 keeps in float32 in Huginn's own code."""


def bench_flops(config: Config, *, dtypes: Sequence[str] = ("fp32", "bf16"), repeats: int = 5,
                threads: int = 1) -> dict[str, Any]:
    """FLOP/s of training compared with those of matrix products, in the same dtype and on as many threads.

    Model: forward and backward of a truncated step at its mean depth, by the FLOPs of `counts` (products recomputed in
    backward and the masked half of attention do not count). Layer: forward and backward of one layer alone. Reference:
    the fastest of several products, in the model's own shapes and as squares of 1,024 and 2,048, with either layout of
    the weight. The three alternate; each figure is a median. With one thread, CPU time is used: a step takes a hundred
    times as long as a product, so time spent waiting for the CPU on a shared machine would count against it alone.
    Returns {dtype: ..., and the bytes a layer keeps for backward in float32}. Raises UserError for data that truncated
    steps do not support, such as images to generate.
    """
    if config.kind.like not in TIMED.kinds:
        raise UserError(f"bench flops times {TIMED.name} steps, which are for {', '.join(TIMED.kinds)}, and this "
                        f"config trains on {config.kind.noun}, {config.kind.source(config)}; use bench step")
    result: dict = {}
    with _threads(threads):
        for dtype in dtypes:
            if dtype not in DTYPES:
                raise UserError(f"dtype '{dtype}' is unknown{did_you_mean(dtype, DTYPES)}")
            result[dtype] = _utilisation(config, dtype, repeats)
        result |= _layer_memory(config)
    return result | {"machine": machine(threads)}


def _utilisation(config: Config, dtype: str, repeats: int) -> dict[str, Any]:
    stepper = Stepper(_truncated(config, dtype))
    layer = LayerBench(stepper)
    products = matrix_products(config, layer.tokens, DTYPES[dtype])
    work = {"model": (lambda: _forward_backward(stepper), stepper.step_flops()),
            "layer": (layer.step, flops_of(layer.step))}
    for function, _ in work.values():
        for _ in range(NUM_WARMUP):
            function()
    rates: dict[str, list[float]] = {name: [] for name in (*work, *products)}
    for _ in range(repeats):
        for name, (function, flops) in (work | products).items():
            rates[name].append(_rate(function, flops))
    best = max(products, key=lambda name: median(rates[name]))
    reference = median(rates[best])
    result = {"matmul_flops_per_second": reference, "matmul": best, "utilisation": median(rates["model"]) / reference,
              "layer_utilisation": median(rates["layer"]) / reference}
    for name in work:
        result |= {f"{name}_flops_per_second": median(rates[name]), f"{name}_flops_per_second_min": min(rates[name]),
                   f"{name}_flops_per_second_max": max(rates[name])}
    return result


def _truncated(config: Config, precision: str) -> Config:
    return at_mean_depth(config.replace(**{"objective": TIMED.name, "training.precision": precision,
                                           "training.accumulation": 1}))


def _forward_backward(stepper: Stepper) -> None:
    with casts_kept():
        stepper.loss().backward()
    stepper.objective.zero_grad()


def _rate(function: Callable[[], object], flops: int | float, least_seconds: float = 0.1) -> float:
    """FLOP/s over as many calls as fill `least_seconds`."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start, calls = clock(), 0
    while (spent := clock() - start) < least_seconds or not calls:
        function()
        calls += 1
    return calls * flops / spent


def matrix_products(config: Config, tokens: int, dtype: torch.dtype, *, device: torch.device | str = "cpu",
                    squares: Sequence[int] = (1024, 2048)) -> dict[str, tuple[Callable[..., Any], int]]:
    """Name -> (matrix product, its FLOPs), each with the second factor stored plainly and transposed: in the model's
    shapes, and `squares` of these sizes."""
    model = config.model
    shapes = {(tokens, model.width, model.width), (tokens, model.width, model.ffn_inputs),
              (tokens, model.hidden, model.width), *((size, size, size) for size in squares)}
    gen, products = generator("matrix products"), {}
    for m, k, n in sorted(shapes):
        a, b = (torch.randn(shape, generator=gen).to(device, dtype) for shape in ((m, k), (k, n)))
        turned = b.T.contiguous().T
        products[f"{m} x {k} x {n}"] = (lambda a=a, b=b: a @ b), 2 * m * k * n
        products[f"{m} x {k} x {n}, transposed"] = (lambda a=a, b=turned: a @ b), 2 * m * k * n
    return products


class LayerBench:
    """Forward and backward of the first core layer alone, on random rows in the shape of a stepper's batch."""

    def __init__(self, stepper: Stepper):
        self.precision: Precision = Precision.of(stepper.config, "cpu")
        self.model: Any = stepper.objective.model
        self.layer: Any = self.model.recurrence.core.blocks[0].layers[0]
        batch = stepper.objective.ask(stepper.inputs.micro_batches[0])
        shape = *batch.targets.shape, self.model.width
        self.x: Tensor = torch.randn(shape, generator=generator(stepper.config.seed, "bench layer")).requires_grad_()
        self.rows: Rows = self.model.placed(self.x, rows_of_batch(batch))
        self.tokens: int = batch.targets.numel()

    def forward(self) -> Tensor:
        with self.precision.autocast():
            return self.layer(self.x, None, self.rows)

    def step(self) -> None:
        with casts_kept():
            out = self.forward()
            out.backward(self.x.detach().to(out.dtype))
        self.layer.zero_grad()
        self.x.grad = None


def _layer_memory(config: Config) -> dict[str, Any]:
    """Bytes that a layer keeps in float32 for one batch, and those of Huginn's own layer if the sizes match."""
    layer = LayerBench(Stepper(_truncated(config, "fp32")))
    (kept, _), model = kept_bytes(layer.forward, layer.model), config.model
    result = {"saved_activation_bytes_per_layer": kept, "tokens": layer.tokens}
    if (model.width, model.num_heads, model.ffn, model.hidden) == (512, 8, "swiglu", 2048):
        huginn = HUGINN_LAYER_BYTES * layer.tokens
        result |= {"huginn_saved_activation_bytes_per_layer": huginn, "saved_activation_ratio": kept / huginn}
    return result


@contextmanager
def _threads(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def format_flops(result: dict[str, Any]) -> str:
    """The table of `bench_flops`."""
    lines = [f"{'dtype':6} {'model':>12} {'layer':>12} {'product':>12}   {'model/product':>13} {'layer/product':>13}"]
    for dtype in (name for name in DTYPES if name in result):
        r = result[dtype]
        rates = [f"{r[key] / 1e9:7.1f} GF/s" for key in
                 ("model_flops_per_second", "layer_flops_per_second", "matmul_flops_per_second")]
        lines.append(f"{dtype:6} {rates[0]:>12} {rates[1]:>12} {rates[2]:>12}   {r['utilisation']:13.1%} "
                     f"{r['layer_utilisation']:13.1%}   (best product: {r['matmul']})")
    ratio = f", {result['saved_activation_ratio']:.2f} x Huginn's" if "saved_activation_ratio" in result else ""
    lines.append(f"a layer keeps {result['saved_activation_bytes_per_layer'] / 1e6:.1f} MB for {result['tokens']:,} "
                 f"tokens in fp32{ratio}")
    return "\n".join([*lines, machine_line(result["machine"])])
