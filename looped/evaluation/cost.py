"""What training costs on this machine: an optimiser step under each rule, and the model's FLOPs beside the processor's.

Every arm of `bench_step` runs in a process of its own, so that its peak memory is its own, and the arms take turns step
by step, so that a slow minute of a shared machine falls on all of them. CPU only. The parent speaks to an arm in lines
of JSON: one setting out, then a command and an answer at a time.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from looped.config import Config, load_config
from looped.config.arms import ARMS, read_arms
from looped.data.opening import vocab_size_of
from looped.errors import KILLED, UserError, did_you_mean
from looped.evaluation.bench_inputs import bench_inputs
from looped.evaluation.depth import peak_bytes
from looped.models.build import build
from looped.nn.rows import PLAIN
from looped.objectives import build_objective
from looped.objectives.counts import count
from looped.objectives.flops import layer_flops
from looped.rng import StepRandom, generator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_WARMUP = 2
"""Steps of an arm that are not timed: until the second, the process still asks the system for memory."""
HUGINN_LAYER_BYTES = 63.6e6 / 1024
"""Bytes that a layer of width 512, 8 heads and SwiGLU of 2,048 keeps a token in float32 in Huginn's own code."""


# ----------------------------------------------------------------------------- one optimiser step, arm beside arm

def bench_step(config: Config, objectives: Sequence[str], *, repeats: int = 5, threads: int = 1) -> dict:
    """Seconds, saved bytes, peak memory and layer forwards of an optimiser step of each arm, and their ratios.

    A step is what the trainer does, on the first batch of the config (of text: on as many random tokens): forward and
    backward over the micro-batches, clip, AdamW, zero_grad. Sampled depth is replaced by its mean (`at_mean_depth`):
    the time of a step is linear in both of its depths, and a handful of draws from so wide a distribution would
    measure the draws. What this leaves out is the smaller batch in which the deepest sequences finish under
    `recurrence.per_sequence`.

    `objectives`: arms as `looped.config.arms` reads them. Returns {"arms": {name: ...}, "ratios": {"first/second":
    ...}, "machine": ...}; seconds are medians, with the least and the most beside them, and cpu_seconds leave out the
    time a process waited for its turn on a shared machine.
    Raises `UserError` for an unknown name or an arm whose process ends early.
    """
    configs = {arm.name: at_mean_depth(arm.config) for arm in read_arms(config, objectives)}
    if not configs:
        raise UserError(f"bench step needs at least one objective; known names: {', '.join(ARMS)}")
    with ExitStack() as stack:
        arms = {name: stack.enter_context(Arm(name, arm, threads)) for name, arm in configs.items()}
        for _ in range(NUM_WARMUP):
            for arm in arms.values():
                arm.ask("step")
        rounds = [{name: arm.ask("step") for name, arm in arms.items()} for _ in range(repeats)]
        figures = {name: _summary([steps[name] for steps in rounds]) | arm.ask("figures")
                   for name, arm in arms.items()}
    return {"arms": figures, "ratios": _ratios(figures, rounds), "machine": machine(threads)}


def at_mean_depth(config: Config) -> Config:
    """Every step as deep as the mean: mean + 1 steps under Huginn's sampler, the last `backprop` with gradient."""
    return config.replace(**config.rule.as_deep_as_mean(config))


def _summary(steps: list[dict]) -> dict:
    seconds = [step["seconds"] for step in steps]
    return {"step_seconds": median(seconds), "step_seconds_min": min(seconds), "step_seconds_max": max(seconds),
            "step_cpu_seconds": median(step["cpu_seconds"] for step in steps)}


def _ratios(figures: dict[str, dict], rounds: list[dict[str, dict]]) -> dict:
    """How many times the later arm's cost each earlier arm has; the time's least and most are those of one round."""
    names, ratios = list(figures), {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = figures[first], figures[second]
            paired = [steps[first]["seconds"] / steps[second]["seconds"] for steps in rounds]
            keys = ("step_seconds", "step_cpu_seconds", "saved_activation_bytes", "peak_rss_bytes", "layer_forwards",
                    "step_flops")
            ratios[f"{first}/{second}"] = {key: a[key] / b[key] for key in keys} | {
                "step_seconds_min": min(paired), "step_seconds_max": max(paired)}
    return ratios


class Arm(AbstractContextManager):
    """The parent's end of one arm's process, whose end is `serve` of `module`."""

    def __init__(self, name: str, config: Config, threads: int, *, module: str = __name__):
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115 closed by __exit__
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {module} import serve; serve()"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        self.settings = {"config": config.model_dump(mode="json"), "threads": threads}

    def ask(self, command: str):
        """The answer to a command; the first one carries the settings ahead of it."""
        lines = [json.dumps(self.settings)] if self.settings else []
        self.settings = {}
        try:
            self.process.stdin.write("\n".join([*lines, json.dumps(command)]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise UserError(f"bench arm '{self.name}' ended early: {self._cause()}")
        return json.loads(line)

    def _cause(self) -> str:
        code = self.process.wait()
        if code == KILLED:
            return "it was killed, most likely for want of memory; try a smaller training.batch_size"
        self.errors.seek(0)
        lines = self.errors.read().split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"{last[:200]} (exit code {code})"

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


def serve(kind: type["Stepper"] | None = None) -> None:
    """The arm's end: the settings, then commands to a stepper until the parent hangs up."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may write among the answers
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    base = psutil.Process().memory_info().rss
    stepper = (kind or Stepper)(load_config(None, settings["config"]))
    commands: dict[str, Callable] = {"step": stepper.step, "figures": lambda: stepper.figures(base)}
    for line in sys.stdin:
        print(json.dumps(commands[json.loads(line)]()), file=answers, flush=True)


class Stepper:
    """Optimiser steps of one config on its first batch (`bench_inputs`)."""

    def __init__(self, config: Config):
        self.config, self.index = config, 0
        self.inputs = bench_inputs(config)
        model = build(config, self.inputs.vocab_size, self.inputs.picture)
        self.objective = build_objective(config, model, self.inputs.end_of_text).train()
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=config.optim.lr, betas=config.optim.betas,
                                           weight_decay=config.optim.weight_decay, fused=True)

    def step(self) -> dict:
        """One more optimiser step: its seconds by the clock on the wall and by the processor's."""
        start, cpu_start = time.perf_counter(), time.process_time()
        parts = self.config.training.accumulation
        for micro in range(parts):
            (self.loss(micro) / parts).backward()
        if self.config.optim.grad_clip:
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.index += 1
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}

    def loss(self, micro: int = 0) -> Tensor:
        """The loss of a micro-batch of the present step."""
        part, total = self.inputs.micro_batches[micro], self.config.training.batch_size
        random = StepRandom(self.config.seed, self.index, start=micro * len(part), count=len(part), total=total)
        with _autocast(self.config.training.precision):
            return self.objective(part, random).value

    def figures(self, base: int) -> dict:
        """What does not vary from step to step. `base`: bytes of the process before it had a model."""
        peak = peak_rss()
        return {"saved_activation_bytes": saved_bytes(self.loss, self.objective), "peak_rss_bytes": peak,
                "base_rss_bytes": base,
                "layer_forwards": self.objective.layer_forwards() * self.config.training.batch_size,
                "step_flops": self.step_flops()}

    def step_flops(self) -> int:
        """FLOPs of an optimiser step in closed form, its sequences as long as the batch has them."""
        each = [count(config, self.inputs.vocab_size).step_flops for config in self.inputs.configs]
        return round(sum(each) / len(each))


def peak_rss() -> int:
    """Largest resident bytes of this program. On Linux not the figure of getrusage, which a child inherits across
    exec from the process that started it."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return found[0] if found else peak_bytes()


def saved_bytes(function: Callable[[], object], module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `function`, every storage once, without `module`'s own."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}  # holds the tensors: a storage that was freed could lend its address to another

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# ----------------------------------------------------------------------------- FLOPs beside matrix products


def bench_flops(config: Config, *, dtypes: Sequence[str] = ("fp32", "bf16"), repeats: int = 5,
                threads: int = 1) -> dict:
    """FLOPs a second of training beside those of matrix products, of the same dtype and on as many threads.

    The model: forward and backward of a truncated step at its mean depth, by the FLOPs of `counts` (products made a
    second time in backward and the masked half of attention do not count as work). The layer: forward and backward of
    one alone. The yardstick: the best of several products, the model's own shapes and squares of 1,024 and 2,048, with
    either layout of the weight. All take turns; each figure is a median. With one thread the clock is the processor's:
    a step is a hundred times as long as a product, so waiting for a turn on a shared machine would fall on it alone.
    Returns {dtype: ..., and what a layer keeps for backward in float32}. Raises UserError for tasks and images.
    """
    if config.is_task or config.is_images:
        what = f"problems of {config.task.name}" if config.is_task else "images"
        raise UserError(f"bench flops times a language model, and this config trains on {what}; use bench step")
    result: dict = {}
    with _threads(threads):
        for dtype in dtypes:
            if dtype not in DTYPES:
                raise UserError(f"dtype '{dtype}' is unknown{did_you_mean(dtype, DTYPES)}")
            result[dtype] = _utilisation(config, dtype, repeats)
        result |= _layer_memory(config)
    return result | {"machine": machine(threads)}


def _utilisation(config: Config, dtype: str, repeats: int) -> dict:
    config = at_mean_depth(config.replace(**{"objective": "truncated", "training.precision": dtype,
                                             "training.accumulation": 1}))
    stepper, layer = Stepper(config), LayerBench(config)
    products = matrix_products(config, DTYPES[dtype])
    work = {"model": (lambda: _forward_backward(stepper), stepper.step_flops()),
            "layer": (layer.step, 3 * layer_flops(config.model, config.data.length) * layer.tokens)}
    for function, _ in work.values():
        for _ in range(NUM_WARMUP):
            function()
    rates: dict[str, list[float]] = {name: [] for name in (*work, *products)}
    for _ in range(repeats):
        for name, (function, flops) in (work | products).items():
            rates[name].append(_rate(function, flops))
    best = max(products, key=lambda name: median(rates[name]))
    yardstick = median(rates[best])
    result = {"matmul_flops_per_second": yardstick, "matmul": best, "utilisation": median(rates["model"]) / yardstick,
              "layer_utilisation": median(rates["layer"]) / yardstick}
    for name in work:
        result |= {f"{name}_flops_per_second": median(rates[name]), f"{name}_flops_per_second_min": min(rates[name]),
                   f"{name}_flops_per_second_max": max(rates[name])}
    return result


def _forward_backward(stepper: Stepper) -> None:
    stepper.loss().backward()
    stepper.objective.zero_grad()


def _rate(function: Callable[[], object], flops: int | float, least_seconds: float = 0.1) -> float:
    """FLOPs a second over as many calls as fill `least_seconds`."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start, calls = clock(), 0
    while (spent := clock() - start) < least_seconds or not calls:
        function()
        calls += 1
    return calls * flops / spent


def matrix_products(config: Config, dtype: torch.dtype) -> dict[str, tuple[Callable, int]]:
    """Name -> (a product, its FLOPs), each with the second factor as it lies and transposed."""
    model, tokens = config.model, config.training.batch_size * config.data.length
    shapes = {(tokens, model.width, model.width), (tokens, model.width, model.ffn_inputs),
              (tokens, model.hidden, model.width), (1024, 1024, 1024), (2048, 2048, 2048)}
    gen, products = generator("matrix products"), {}
    for m, k, n in sorted(shapes):
        a, b = torch.randn(m, k, generator=gen).to(dtype), torch.randn(k, n, generator=gen).to(dtype)
        turned = b.T.contiguous().T
        products[f"{m} x {k} x {n}"] = (lambda a=a, b=b: a @ b), 2 * m * k * n
        products[f"{m} x {k} x {n}, transposed"] = (lambda a=a, b=turned: a @ b), 2 * m * k * n
    return products


class LayerBench:
    """Forward and backward of the first core layer alone, on a micro-batch of random rows."""

    def __init__(self, config: Config):
        self.precision, self.tokens = config.training.precision, config.training.batch_size * config.data.length
        self.model = build(config, vocab_size_of(config))
        self.layer = self.model.recurrence.core.blocks[0].layers[0]
        shape = config.training.batch_size, config.data.length, config.model.width
        self.x = torch.randn(shape, generator=generator(config.seed, "bench layer")).requires_grad_()
        self.rows = self.model.placed(self.x, PLAIN)

    def forward(self) -> Tensor:
        with _autocast(self.precision):
            return self.layer(self.x, None, self.rows)

    def step(self) -> None:
        out = self.forward()
        out.backward(self.x.detach().to(out.dtype))
        self.layer.zero_grad()
        self.x.grad = None


def _layer_memory(config: Config) -> dict:
    """What a layer keeps in float32 for one batch; beside it Huginn's own layer, where the sizes are the same."""
    layer = LayerBench(config.replace(**{"training.precision": "fp32", "objective": "truncated"}))
    kept, model = saved_bytes(layer.forward, layer.model), config.model
    result = {"saved_activation_bytes_per_layer": kept, "tokens": layer.tokens}
    if (model.width, model.num_heads, model.ffn, model.hidden) == (512, 8, "swiglu", 2048):
        huginn = HUGINN_LAYER_BYTES * layer.tokens
        result |= {"huginn_saved_activation_bytes_per_layer": huginn, "saved_activation_ratio": kept / huginn}
    return result


# ----------------------------------------------------------------------------- surroundings and tables


def machine(threads: int) -> dict:
    """Where the figures were measured."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        processor = names[0] if names else processor
    return {"processor": processor, "logical_cpus": os.cpu_count() or 1, "threads": threads,
            "torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def _autocast(precision: str) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def _threads(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def format_step(result: dict) -> str:
    """The table of `bench_step`."""
    heads = "s a step", "least - most", "kept, MB", "peak, MB", "layer fwd"
    lines = [f"{'objective':16} {heads[0]:>9} {heads[1]:>17} {heads[2]:>10} {heads[3]:>10} {heads[4]:>10}"]
    for name, a in result["arms"].items():
        spread = f"{a['step_seconds_min']:.3f} - {a['step_seconds_max']:.3f}"
        lines.append(f"{name:16} {a['step_seconds']:9.3f} {spread:>17} {a['saved_activation_bytes'] / 1e6:10.1f} "
                     f"{a['peak_rss_bytes'] / 1e6:10.0f} {a['layer_forwards']:10.0f}")
    for name, r in result["ratios"].items():
        lines.append(f"{name}: {r['step_seconds']:.2f} x the time ({r['step_seconds_min']:.2f} - "
                     f"{r['step_seconds_max']:.2f} round by round; {r['step_cpu_seconds']:.2f} x the processor "
                     f"time), {r['saved_activation_bytes']:.2f} x the bytes kept, "
                     f"{r['layer_forwards']:.2f} x the layer forwards")
    return "\n".join([*lines, machine_line(result["machine"])])


def format_flops(result: dict) -> str:
    """The table of `bench_flops`."""
    lines = [f"{'dtype':6} {'model':>12} {'layer':>12} {'product':>12}   {'model/product':>13} {'layer/product':>13}"]
    for dtype in (name for name in DTYPES if name in result):
        r = result[dtype]
        rates = [f"{r[key] / 1e9:7.1f} GF/s" for key in
                 ("model_flops_per_second", "layer_flops_per_second", "matmul_flops_per_second")]
        lines.append(f"{dtype:6} {rates[0]:>12} {rates[1]:>12} {rates[2]:>12}   {r['utilisation']:13.1%} "
                     f"{r['layer_utilisation']:13.1%}   (best product: {r['matmul']})")
    beside = f", {result['saved_activation_ratio']:.2f} of Huginn's" if "saved_activation_ratio" in result else ""
    lines.append(f"a layer keeps {result['saved_activation_bytes_per_layer'] / 1e6:.1f} MB of {result['tokens']:,} "
                 f"tokens in fp32{beside}")
    return "\n".join([*lines, machine_line(result["machine"])])


def machine_line(where: dict) -> str:
    return (f"{where['processor']}, {where['threads']} of {where['logical_cpus']} CPUs, torch {where['torch']}, "
            f"{where['cpu_capability']}")
