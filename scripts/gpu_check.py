"""The first run on a CUDA device: what fits, what passes, what a step launches, waits for and takes, in eight minutes.

    python scripts/gpu_check.py --out runs/gpu-check                # on the device
    python scripts/gpu_check.py --out /tmp/dry --device cpu --tiny  # a dry run of the same code, small

Each section runs in a process of its own with a deadline, so that one that hangs, or that leaves CUDA in an error,
takes no other along. A row is printed once it is measured, and `gpu_check.json` is rewritten after each row; a
measurement that fails is a row with the error in one line, whose traceback is in `gpu_check.log`. Weights and tokens
are random, and nothing is downloaded. docs/performance.md says what the rows hold.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import accelerate  # noqa: F401 with what it imports, once for all sections
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from looped.atomic_files import write_text
from looped.config import Config, load_config
from looped.cost.bench_step import at_mean_depth
from looped.cost.counts import count
from looped.cost.mfu import matrix_products
from looped.devices import DTYPES, Placement, find_device, now, pinned
from looped.domains.text import RandomText
from looped.evaluation.depth_sweep import peak_bytes
from looped.inference.generate import generate
from looped.models.build import build
from looped.nn import fused
from looped.nn.attention import attention, available_backends, choose_backend, context_attention
from looped.nn.backends import BACKENDS, xformers_absent
from looped.nn.masks import Causal, CleanNoisy, Mask, Packed, Padded, SlidingWindow
from looped.objectives import build_objective
from looped.precision import Precision
from looped.rng import DeviceRandom, StepRandom, generator
from looped.training.determinism import CUBLAS, CUBLAS_VALUES
from looped.training.draw_ahead import DrawAhead
from looped.training.runs import versions
from looped.training.train import open_trainer
from looped.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
SECONDS = 480
"""Seconds for the whole, in which the sections' own deadlines add up."""

TESTS_SECONDS = 38
"""Seconds for each of the two runs of pytest, so that both fit the deadline of their section."""

Row = dict[str, Any]
Cases = Iterator[tuple[Row, Callable[[], Row]]]
"""(labels, a measurement that returns figures)."""


@dataclass(frozen=True)
class Check:
    """Device, size and files of a check. log: takes what a section's process writes."""

    device_name: str
    tiny: bool
    log: Path

    @cached_property
    def device(self) -> torch.device:
        """Asked for within a section only: a process that has started CUDA cannot be forked."""
        return find_device(self.device_name)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def sizes(self, full: Any, tiny: Any) -> Any:
        """The first, or for a dry run the second."""
        return tiny if self.tiny else full

    def config(self, rule: str, batch: int, precision: str = "bf16", **changes: Any) -> Config:
        """huginn-70m under a rule of `RULES`, with a batch and a precision (`PRECISIONS`)."""
        settings = RULES[rule] | {"training.batch_size": batch} | PRECISIONS[precision]
        return load_config(ROOT / "configs" / "huginn-70m.yaml", settings | self.sizes({}, TINY) | changes)


RULES = {
    "ar": {"objective": "ar"}, "full": {"objective": "full", "recurrence.mean": 4},
    "truncated, a depth per sequence": {"objective": "truncated"},
    "truncated, a depth per batch": {"objective": "truncated", "recurrence.per_sequence": False},
    "denoise inject": {"objective": "denoise", "denoise.context": "inject"},
    "denoise concat": {"objective": "denoise", "denoise.context": "concat"},
    "denoise context": {"objective": "denoise", "denoise.context": "context"},
    "masked": {"objective": "masked", "model.state_init": "zero", "blocks.num": 2},
    "blockwise": {"objective": "blockwise", "blocks.num": 2},
    "progressive": {"objective": "progressive", "recurrence.mean": 4}, "one-step": {"objective": "one-step"},
}
PRECISIONS = {"bf16": {"training.precision": "bf16"},
              "fp32": {"training.precision": "fp32", "training.tf32": False},
              "TF32": {"training.precision": "fp32", "training.tf32": True}}
TINY = {"model.width": 16, "model.num_heads": 2, "model.ffn_width": 32, "model.num_prelude_layers": 1,
        "model.num_core_layers": 2, "model.num_coda_layers": 1, "recurrence.mean": 3, "recurrence.backprop": 2,
        "denoise.cond_width": 8, "denoise.target.dim": 4, "data.vocab_size": 300, "data.length": 32,
        "training.threads": 1}
WIDE = {"model.width": 2048, "model.num_heads": 16, "model.ffn_width": 8192, "data.vocab_size": 50304,
        "data.length": 1024}
"""0.65 billion parameters, in the layers of huginn-70m."""


# ----------------------------------------------------------------------------- training, as `looped train` does it


@dataclass(frozen=True)
class RandomTokens(RandomText):
    """Random tokens as training data."""

    def batch(self, step: int, *, length: int, **rest: Any) -> Tensor:
        return super().batch(step, **rest)

    def describe(self, step: int, *, rows: range, **rest: Any) -> list[str]:
        return [f"row {row} of the random tokens" for row in rows]


@dataclass(frozen=True)
class RandomData:
    """The data of a training run, without a corpus and a tokenizer."""

    vocab_size: int
    train: RandomTokens
    picture = tokenizer = None
    end_of_text, fingerprint, summary = 0, "random tokens", "random tokens"

    @property
    def facts(self) -> dict[str, Any]:
        return {"source": self.summary}


@contextmanager
def training(config: Config) -> Iterator[Trainer]:
    """A trainer of the config on random tokens, of which nothing is kept."""
    vocab_size = config.data.vocab_size
    data = RandomData(vocab_size, RandomTokens(vocab_size, config.data.length))
    with (tempfile.TemporaryDirectory() as folder,
          open_trainer(config, Path(folder) / "run", data=data, evaluate=lambda *_: {}, quiet=True) as trainer):
        yield trainer
        trainer.saved = trainer.done.step


def step_times(trainer: Trainer, num: int) -> tuple[list[float], list[float]]:
    """(seconds of each step until the device is done, seconds of each that the host did not spend in `check`, whose
    read of the losses waits for the device)."""
    device, check, seconds, waits = trainer.accelerator.device, trainer.check, [], []

    def timed_check(*args: Any) -> None:
        start = time.perf_counter()
        check(*args)
        waits.append(time.perf_counter() - start)

    with patch.object(trainer, "check", timed_check):
        for _ in range(num):
            start = now(device)
            trainer.train_step()
            seconds.append(now(device) - start)
    return seconds, [whole - wait for whole, wait in zip(seconds, waits, strict=True)]


def mean_seconds(function: Callable[[], Any], check: Check, num: int = 10) -> float:
    """Mean seconds of a call, after three that are not timed."""
    for _ in range(check.sizes(3, 1)):
        function()
    num, start = check.sizes(num, 2), now(check.device)
    for _ in range(num):
        function()
    return (now(check.device) - start) / num


@contextmanager
def memory(figures: Row, check: Check) -> Iterator[None]:
    """Add the peak bytes of the block: on CUDA of its allocator, elsewhere of the process so far."""
    if check.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    yield
    figures["peak_bytes"] = peak_bytes()


# ----------------------------------------------------------------------------- env


def env(check: Check) -> Cases:
    """Versions, the device, and the attention that each mask would run, with the reasons of the others."""
    yield {"what": "versions"}, lambda: versions() | {
        name: str(value) for name, value in (("cuda", torch.version.cuda), ("cudnn", torch.backends.cudnn.version()),
                                             ("triton", _version("triton")), ("platform", platform.platform()))}
    yield {"what": "device"}, lambda: {"name": Placement(check.device).name} | (_card(check) if check.on_gpu else {})
    yield {"what": "xformers"}, lambda: {"misfit": xformers_absent()}
    masks = Causal(), Packed(((8, 8), (16,))), Padded([8, 16]), CleanNoisy(8), SlidingWindow(4)
    for dtype in ("bf16", "fp32"):
        for mask in masks:
            yield ({"what": "attention", "mask": type(mask).__name__, "dtype": dtype},
                   partial(_choice, check, mask, DTYPES[dtype]))


def _version(module: str) -> str:
    try:
        return __import__(module).__version__
    except ImportError:
        return "missing"


def _card(check: Check) -> Row:
    card = torch.cuda.get_device_properties(check.device)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() if shutil.which(
        asked[0]) else "unknown"
    return {"capability": f"{card.major}.{card.minor}", "bytes": card.total_memory, "driver": driver,
            "multiprocessors": card.multi_processor_count}


def _choice(check: Check, mask: Mask, dtype: torch.dtype) -> Row:
    chosen = choose_backend("auto", mask, check.device, dtype, needs_gradient=True)
    reasons = available_backends(check.device, dtype, mask)
    return {"auto": chosen, "declined": {name: reason for name, reason in reasons.items() if reason}}


# ----------------------------------------------------------------------------- tests


def tests(check: Check) -> Cases:
    """The tests that need a device, those of flex last, since its kernels are compiled."""
    for pick in ("not flex", "flex"):
        yield {"tests": pick}, partial(_pytest, check, pick)


def _pytest(check: Check, pick: str) -> Row:
    if not check.on_gpu:
        return {"skipped": "they need a CUDA device"}
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py")
                   if "mark.gpu" in path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-k", pick, f"--junitxml={report}", *files]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TESTS_SECONDS)
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode(errors="replace")
            raise RuntimeError(f"pytest took more than {TESTS_SECONDS} s, and was at: {last_line(said)}") from None
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report: {last_line(done.stdout + done.stderr)}")
        return outcomes(report)


def outcomes(report: Path) -> Row:
    """Counts of a report in JUnit's form, and of each failed test the first line."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = {f"{case.get('classname')}::{case.get('name')}": first_line(found.get("message") or found.text or "")
              for case in cases for found in (*case.iter("failure"), *case.iter("error"))}
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped, "failures": failed}


# ----------------------------------------------------------------------------- syncs and launches of a step


def traffic(check: Check) -> Cases:
    """Kernels, copies and waits of a training step of each rule."""
    for rule in RULES:
        yield {"rule": rule, "batch": check.sizes(4, 2)}, partial(_traffic, check, rule)


def _traffic(check: Check, rule: str) -> Row:
    with training(check.config(rule, check.sizes(4, 2))) as trainer:
        step_times(trainer, check.sizes(3, 2))
        waits = synchronisations(trainer.train_step) if check.on_gpu else {}
        return waits | measured(lambda: launches(trainer.train_step, check))  # the waits alone without a profiler


def synchronisations(function: Callable[[], Any]) -> Row:
    """The number of waits of the host for the device, by torch's own debug mode, and the lines where it does."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    where = Counter(f"{each.filename.removeprefix(str(ROOT) + '/')}:{each.lineno}" for each in said
                    if "synchronizing CUDA operation" in str(each.message))
    return {"syncs": where.total(), "where": dict(where)}


def launches(function: Callable[[], Any], check: Check) -> Row:
    """Counts of a call by torch's profiler: operations (without those that only call others) and, on CUDA, kernels,
    copies, and the calls of the host that launch."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities + [torch.profiler.ProfilerActivity.CUDA] * check.on_gpu) as found:
        function()
        now(check.device)
    events = list(found.events())
    inner = {id(event.cpu_parent) for event in events if event.name.startswith("aten::") and event.cpu_parent}
    figures = {"operations": sum(event.name.startswith("aten::") and id(event) not in inner for event in events)}
    if check.on_gpu:
        there = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA
                 and not event.is_user_annotation]  # a name for a stretch of kernels, such as the optimiser's
        copies = Counter(event.name for event in there if event.name.startswith(("Memcpy", "Memset")))
        figures |= {"kernels": len(there) - copies.total(), "copies": dict(copies),
                    "launches": sum("Launch" in event.name for event in events
                                    if event.device_type == torch.autograd.DeviceType.CPU)}
    return figures


# ----------------------------------------------------------------------------- step times


def steps(check: Check) -> Cases:
    """Training steps of rules by batch and precision, beside the fastest matrix product here."""
    best: dict[str, float] = {}
    work = cache(partial(_flops_of_a_row, check))
    for precision in PRECISIONS:
        yield {"product": precision}, partial(_products, check, precision, best)
    timed = [(rule, batch, "bf16", {}) for batch in (4, 32, 128) for rule in list(RULES)[:8] if rule != "full"]
    timed += [("denoise inject", 32, precision, {}) for precision in ("fp32", "TF32")]
    timed += [(rule, 16, "bf16", WIDE) for rule in ("ar", "denoise inject")]
    for rule, batch, precision, changes in check.sizes(timed, [("denoise inject", 2, "fp32", {}),
                                                               ("truncated, a depth per batch", 2, "bf16", {})]):
        yield ({"rule": rule, "batch": batch, "precision": precision, "wide": bool(changes)},
               partial(_step, check, check.config(rule, batch, precision, **changes),
                       partial(work, rule, bool(changes)), best.get(precision)))


def _products(check: Check, precision: str, best: dict[str, float]) -> Row:
    """FLOP/s of the fastest matrix product in the model's shapes and as squares."""
    config, squares = check.config("ar", 1, precision), check.sizes((2048, 8192), (64,))
    dtype = DTYPES["bf16" if precision == "bf16" else "fp32"]
    rates = {}
    with Precision.of(config, check.device).products(check.device):
        found = matrix_products(config, check.sizes(2**15, 64), dtype, device=check.device, squares=squares)
        for name, (product, flops) in found.items():
            rates[name] = flops / mean_seconds(product, check)
    fastest = max(rates, key=rates.__getitem__)
    best[precision] = rates[fastest]
    return {"tflops": rates[fastest] / 1e12, "fastest": fastest}


def _flops_of_a_row(check: Check, rule: str, wide: bool) -> int:
    """FLOPs of a sequence in a step. Counted for one, at the mean depth, since a step is linear in both, and a count on
    fake tensors takes seconds where there are a hundred layers."""
    config = at_mean_depth(check.config(rule, 1, **(WIDE if wide else {})))
    return count(config, config.data.vocab_size).step_flops


def _step(check: Check, config: Config, work: Callable[[], int], best: float | None) -> Row:
    figures: Row = {}
    with training(config) as trainer:
        step_times(trainer, check.sizes(3, 1))
        with memory(figures, check):
            seconds, host = step_times(trainer, check.sizes(10, 2))
        start = time.perf_counter()
        trainer.ahead.plan.make(trainer.ahead.prepare(trainer.done.step + 1, 0)[1])
        draw, middle = time.perf_counter() - start, median(seconds)
    flops = work() * config.training.batch_size
    return {"ms": 1e3 * middle, "ms_min": 1e3 * min(seconds), "ms_max": 1e3 * max(seconds),
            "host_ms": 1e3 * median(host), "draw_ms": 1e3 * draw,
            "tokens_per_second": config.training.batch_size * config.data.length / middle,
            "tflops": flops / middle / 1e12,
            "of_product": flops / middle / best if best else None, **figures}


# ----------------------------------------------------------------------------- compile


def compiled(check: Check) -> Cases:
    """`training.compile` against eager steps from the same seed."""
    rules = ("denoise inject", "ar", "denoise context", "masked")
    timed = [(rule, "objective", 32, {}) for rule in rules]
    timed += [("truncated, a depth per batch", "step", 32, {}), ("denoise inject", "step", 32, {})]
    timed += [("denoise inject", "cuda-graphs", 4, {}), ("ar", "cuda-graphs", 4, {})]
    timed += [("ar", "objective", 4, {"optim.name": "muon"})]
    tiny = [("ar", "objective", 2, {"optim.name": "muon"}), ("denoise inject", "step", 2, {})]
    for rule, how, batch, settings in check.sizes(timed, tiny):
        yield ({"rule": rule, "compile": how, "batch": batch, **settings},
               partial(_compiled, check, rule, how, batch, settings))


def _compiled(check: Check, rule: str, how: str, batch: int, settings: dict[str, Any]) -> Row:
    first, later = check.sizes((5, 10), (3, 2))
    eager, eager_seconds = _losses(check.config(rule, batch, **settings), first, later)
    torch._dynamo.reset()
    counters.clear()
    # A dry run traces the same graphs, and leaves Inductor out, whose compiler of C++ takes minutes.
    small = patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")) if check.tiny else nullcontext()
    with small:
        losses, seconds = _losses(check.config(rule, batch, **settings, **{"training.compile": how}), first, later)
    middle = median(seconds[first:])
    return {"ms": 1e3 * middle, "eager_ms": 1e3 * median(eager_seconds[first:]),
            "compile_seconds": sum(seconds) - len(seconds) * middle, "graphs": counters["stats"]["unique_graphs"],
            "breaks": dict(counters["graph_break"]),
            "error": max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses, eager, strict=True))}


def _losses(config: Config, first: int, later: int) -> tuple[list[float], list[float]]:
    """(losses, seconds) of each step of a training run; the first ones compile."""
    losses, seconds = [], []
    with training(config) as trainer:
        for _ in range(first + later):
            seconds += step_times(trainer, 1)[0]
            losses.append(trainer.figures["loss"])
    return losses, seconds


# ----------------------------------------------------------------------------- attention


def attend(check: Check) -> Cases:
    """Forward and backward of attention by shape, mask and backend, in bf16."""
    for shape in check.sizes([(128, 256, 8, 64), (16, 1024, 16, 128), (4, 4096, 16, 128)], [(2, 16, 2, 8)]):
        for backend in (*BACKENDS, "efficient"):
            yield ({"mask": "causal", "backend": backend, "shape": shape},
                   partial(_attend, check, shape, backend, Causal))
        for backend in ("xformers", "flex", "sdpa"):  # each sequence is half as long as the one before
            lengths = [max(1, shape[1] >> row % 3) for row in range(shape[0])]
            yield ({"mask": "padded", "backend": backend, "shape": shape},
                   partial(_attend, check, shape, backend, partial(Padded, lengths)))
        for backend in ("xformers", "flash", "sdpa"):
            yield ({"mask": "context", "backend": backend, "shape": shape},
                   partial(_attend_context, check, shape, backend))


def _heads(check: Check, shape: tuple[int, ...], num: int) -> list[Tensor]:
    drawn = (torch.randn(shape, generator=generator("attention", index)) for index in range(num))
    return [values.to(check.device, torch.bfloat16).requires_grad_() for values in drawn]


def _attend(check: Check, shape: tuple[int, ...], backend: str, mask: Callable[[], Mask]) -> Row:
    held, given = mask(), _heads(check, shape, 3)
    one_kernel = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if backend == "efficient" else nullcontext()
    with one_kernel:
        return _forward_backward(check, shape, given, lambda *heads: attention(
            *heads, held, backend="sdpa" if backend == "efficient" else backend))


def _attend_context(check: Check, shape: tuple[int, ...], backend: str) -> Row:
    return _forward_backward(check, shape, _heads(check, shape, 5), partial(context_attention, backend=backend))


def _forward_backward(check: Check, shape: tuple[int, ...], given: list[Tensor], run: Callable[..., Tensor]) -> Row:
    """ms and TFLOP/s of forward and backward; FLOPs are those of the causal half: two products, then four."""
    figures: Row = {}
    grad = torch.ones(shape, device=check.device, dtype=torch.bfloat16)
    with memory(figures, check):
        seconds = mean_seconds(lambda: torch.autograd.grad(run(*given), given, grad), check)
    batch, length, heads, dim = shape
    flops = 12 * batch * heads * dim * length * (length + 1) // 2
    return {"ms": 1e3 * seconds, "tflops": flops / seconds / 1e12, **figures}


# ----------------------------------------------------------------------------- loss


def loss(check: Check) -> Cases:
    """Forward and backward of the cross-entropy by vocabulary, with more or fewer logits in memory at once."""
    rows = check.sizes(2**14, 256)
    for vocab, width in check.sizes([(4096, 512), (50304, 2048), (151936, 2048)], [(64, 16)]):
        for logits in check.sizes([2**26, 2**27, 2**28, 2**29], [2**12]):
            for evidence in (False, True):
                yield ({"vocab": vocab, "width": width, "rows": rows, "logits_at_once": logits, "evidence": evidence},
                       partial(_loss, check, rows, vocab, width, logits, evidence))


def _loss(check: Check, rows: int, vocab: int, width: int, logits: int, evidence: bool) -> Row:
    gen = torch.Generator(check.device).manual_seed(0)  # on the device: the largest weight has 311 million numbers

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, device=check.device).requires_grad_()

    def parts(x: Tensor, vocab: int) -> list[slice]:
        length = max(128, logits // vocab)
        return [slice(start, start + length) for start in range(0, len(x), length)]

    x, weight, targets = draw(1, rows, width), draw(vocab, width), torch.arange(rows, device=check.device)[None] % vocab
    extra, scale = (draw(1, rows, 16), draw(vocab, 16)) if evidence else None, torch.full((), 0.02, device=check.device)
    figures: Row = {}

    def step() -> None:
        with torch.autocast(check.device.type, torch.bfloat16):
            losses = fused.linear_cross_entropy(x, weight, targets, scale=scale, evidence=extra)
        torch.autograd.grad(losses.mean(), [x, weight, *(extra or ())])

    with patch.object(fused, "row_parts", parts), memory(figures, check):
        seconds = mean_seconds(step, check, num=5)
    return {"ms": 1e3 * seconds, "ns_per_logit": 1e9 * seconds / rows / vocab, "parts": len(parts(x[0], vocab)),
            **figures}


# ----------------------------------------------------------------------------- generation


def generation(check: Check) -> Cases:
    """Tokens per second, and what a token launches."""
    deep = check.sizes(8, 2)
    for rule, depth in (("ar", 1), ("truncated, a depth per batch", deep), ("denoise context", deep)):
        for batch in check.sizes((1, 16), (2,)):
            yield {"rule": rule, "batch": batch, "depth": depth}, partial(_generation, check, rule, batch, depth)


def _generation(check: Check, rule: str, batch: int, depth: int) -> Row:
    config, num = check.config(rule, batch), check.sizes(32, 2)
    objective = build_objective(config, build(config, config.data.vocab_size, None), 0).to(check.device).eval()
    prompt = torch.randint(config.data.vocab_size, (batch, 8), generator=generator("prompt")).to(check.device)

    def write(num_tokens: int) -> None:
        generate(objective, prompt, num_tokens=num_tokens, depth=depth, past_the_end=True)

    with Placement(check.device, "bf16").at_work():
        seconds = mean_seconds(lambda: write(num), check, num=2)
        one, three = launches(lambda: write(1), check), launches(lambda: write(3), check)
    counted = [name for name in ("operations", "kernels", "launches") if name in one]
    return {"tokens_per_second": batch * num / seconds, "ms_per_token": 1e3 * seconds / num} | {
        f"{name}_per_token": (three[name] - one[name]) / 2 for name in counted}


# ----------------------------------------------------------------------------- draws and determinism


def draws(check: Check) -> Cases:
    """The initial state of a batch: drawn, pinned, copied; and steps with and without the thread that draws ahead."""
    batch, shape = check.sizes((128, (256, 512)), (2, (16, 16)))
    values = StepRandom(0, 0, count=batch).normal("state", shape)
    yield {"what": "drawn on the host"}, lambda: _seconds(
        lambda: StepRandom(0, 0, count=batch).normal("state", shape), check) | {"bytes": values.nbytes}
    if check.on_gpu:
        held = pinned(values, check.device)
        yield {"what": "pinned"}, lambda: _seconds(lambda: pinned(values, check.device), check)
        yield {"what": "copied from pageable memory"}, lambda: _seconds(lambda: values.to(check.device), check)
        yield {"what": "copied from pinned memory"}, lambda: _seconds(
            lambda: held.to(check.device, non_blocking=True), check)
    yield {"what": "the same on the device"}, lambda: {"equal": torch.equal(
        values, StepRandom(0, 0, count=batch, device=check.device).normal("state", shape).cpu())}
    philox = partial(DeviceRandom, 0, 0, count=batch)
    yield {"what": "made on the device by Philox"}, lambda: _seconds(
        lambda: philox(device=check.device).normal("state", shape), check)
    yield {"what": "Philox there beside here"}, lambda: {"error": (
        philox().normal("state", shape) - philox(device=check.device).normal("state", shape).cpu()).abs().max().item()}
    for threaded in (True, False):
        yield ({"what": f"a step, drawn {'by a thread' if threaded else 'when asked for'}", "batch": batch},
               partial(_step_by, check, batch, threaded))


def _seconds(function: Callable[[], Any], check: Check) -> Row:
    return {"ms": 1e3 * mean_seconds(function, check)}


def _step_by(check: Check, batch: int, threaded: bool) -> Row:
    with training(check.config("ar", batch)) as trainer:
        trainer.ahead.close()
        trainer.ahead = ahead = DrawAhead(trainer.ahead.prepare, 1, threaded=threaded)
        try:
            step_times(trainer, check.sizes(3, 2))
            return {"ms": 1e3 * median(step_times(trainer, check.sizes(10, 2))[0])}
        finally:
            ahead.close()


def determinism(check: Check) -> Cases:
    """The weights after three steps, twice, with and without `training.deterministic`."""
    os.environ.setdefault(CUBLAS, CUBLAS_VALUES[0])  # before CUDA starts, for all rows
    for rule in ("ar", "denoise context"):
        for deterministic in (False, True):
            yield {"rule": rule, "deterministic": deterministic}, partial(_twice, check, rule, deterministic)


def _twice(check: Check, rule: str, deterministic: bool) -> Row:
    config, both = check.config(rule, check.sizes(16, 2), **{"training.deterministic": deterministic}), []
    for _ in range(2):
        with training(config) as trainer:
            seconds, _ = step_times(trainer, 3)
            both.append([weight.detach().clone() for weight in trainer.objective.parameters()])
    furthest = max(float((a - b).abs().max()) for a, b in zip(*both, strict=True))
    return {"equal": furthest == 0, "difference": furthest, "ms": 1e3 * min(seconds)}


# ----------------------------------------------------------------------------- sections, one after another


DONE = "done"


@dataclass(frozen=True)
class Section:
    """cases: what is measured. seconds: its deadline, of `SECONDS` in all."""

    cases: Callable[[Check], Cases]
    seconds: float


SECTIONS = {"env": Section(env, 20), "tests": Section(tests, 80), "traffic": Section(traffic, 45),
            "steps": Section(steps, 110), "compile": Section(compiled, 90), "attention": Section(attend, 45),
            "loss": Section(loss, 35), "generation": Section(generation, 30), "draws": Section(draws, 10),
            "determinism": Section(determinism, 15)}


def serve(section: Section, check: Check, sender: Any) -> None:
    """A section's own process: send (row, "") for each row, then ({}, how the section ended)."""
    os.setsid()  # so that the programs it starts end with it
    with check.log.open("a", encoding="utf-8", newline="") as log:
        for stream in (1, 2):  # of the process, since libraries write there too
            os.dup2(log.fileno(), stream)
    try:
        if not check.on_gpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        for labels, measure in section.cases(check):
            sender.send((labels | measured(measure), ""))
            gc.collect()
            if check.on_gpu:
                torch.cuda.empty_cache()
        sender.send(({}, DONE))
    except Exception as error:
        sender.send(({}, described(error)))


def measured(measure: Callable[[], Row]) -> Row:
    """The figures, or in one line why there are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return measure()
    except Exception as error:
        traceback.print_exc()
        return {"failed": described(error)}


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(str(error))}"


def first_line(text: str) -> str:
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), "no reason given")


def last_line(text: str) -> str:
    return first_line("\n".join(reversed(text.splitlines())))


def run_section(section: Section, check: Check, seconds: float, keep: Callable[[Row], None]) -> str:
    """Run a section for at most `seconds` and keep its rows; returns how it ended."""
    context = multiprocessing.get_context("fork")  # with all modules imported, and CUDA not started
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(section, check, sender))
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            row, ended = receiver.recv()
            if ended:
                return ended
            keep(row)
        return f"stopped at its deadline of {seconds:.0f} s"
    except EOFError:
        process.join()
        return f"ended early, with exit code {process.exitcode}"
    finally:
        kill(process)


def kill(process: Any) -> None:
    """End the process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all have ended, or it was killed before it led a group
        process.kill()
    process.join()


@dataclass
class Report:
    """The rows measured, in a file that is rewritten after each row."""

    path: Path
    found: dict[str, Any]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, name: str, check: Check, seconds: float) -> None:
        """Run a section, and print and write what it finds."""
        section, start, rows = SECTIONS[name], time.monotonic(), []
        self.sections[name] = own = {"about": section.cases.__doc__, "ended": "not yet", "seconds": 0.0, "rows": rows}
        print(f"\n{name}: {section.cases.__doc__}", flush=True)

        def keep(row: Row) -> None:
            rows.append(row)
            print("  " + shown(row), flush=True)
            self.write()

        own["ended"] = run_section(section, check, seconds, keep)
        own["seconds"] = time.monotonic() - start
        print(f"  {own['ended']}; {own['seconds']:.1f} s", flush=True)
        self.write()

    def write(self) -> None:
        write_text(self.path, json.dumps(self.found | {"sections": self.sections}, indent=1) + "\n")


def shown(row: Row) -> str:
    """A row as names and values."""
    return " | ".join(f"{name} {cell(value)}" for name, value in row.items())


def cell(value: Any) -> str:
    if type(value) is float:
        return f"{value:,.4g}"
    return f"{value:,}" if type(value) is int else str(value) or "none"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for gpu_check.json and gpu_check.log")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu for a dry run")
    parser.add_argument("--tiny", action="store_true", help="a small model and few steps")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the whole; the deadlines scale with it")
    options = parser.parse_args(arguments)
    names = options.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"there is no section {', '.join(unknown)}; write some of {','.join(SECTIONS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options.device, options.tiny, options.out / "gpu_check.log")
    report = Report(options.out / "gpu_check.json", {"started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                                                     "device": options.device, "tiny": options.tiny})
    end = time.monotonic() + options.seconds
    for name in names:
        own = SECTIONS[name].seconds * options.seconds / SECONDS
        report.run(name, check, max(0.0, min(own, end - time.monotonic())))
    print(f"\nall of it is in {report.path}")
    return 0 if all(section["ended"] == DONE for section in report.sections.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
