"""Training steps timed in one process per arm, so that peak memory is measured per arm. The arms alternate step by
step, so that a slow minute on a shared machine affects all of them.

CPU only. The parent and an arm exchange lines of JSON: first the settings, then one command and one answer at a time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch import Tensor, nn

from looped.config import Config, load_config
from looped.cost.traced_flops import FakeTraining, kept_bytes
from looped.domains import domain_of
from looped.domains.base import Inputs
from looped.errors import KILLED, UserError
from looped.evaluation.depth_sweep import peak_bytes
from looped.models.build import build
from looped.nn.cast_once import casts_kept
from looped.objectives import Objective, build_objective
from looped.precision import Precision
from looped.rng import StepRandom

NUM_WARMUP = 2
"""Untimed first steps of an arm: up to the second, the process still allocates memory from the system."""


class Arm(AbstractContextManager["Arm"]):
    """One arm's process as seen by the parent; the process runs `serve` of `module`."""

    def __init__(self, name: str, config: Config, threads: int, *, module: str = __name__):
        self.name = name
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed by __exit__
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-c", f"from {module} import serve; serve()"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        self.settings: dict[str, Any] = {"config": config.model_dump(mode="json"), "threads": threads}

    def ask(self, command: str) -> Any:
        """Send a command and return its answer; the settings are sent ahead of the first command."""
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
            return "it was killed, most likely because memory ran out; try a smaller training.batch_size"
        self.errors.seek(0)
        lines = self.errors.read().split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed no error")
        return f"{last[:200]} (exit code {code})"

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


def serve(kind: type["Stepper"] | None = None) -> None:
    """Main loop of an arm's process: read the settings, then answer commands until the parent closes the pipe."""
    answers, sys.stdout = sys.stdout, sys.stderr  # other output must not mix with the answers
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    base = psutil.Process().memory_info().rss
    stepper = (kind or Stepper)(load_config(None, settings["config"]))
    commands: dict[str, Callable] = {"step": stepper.step, "figures": lambda: stepper.figures(base)}
    for line in sys.stdin:
        print(json.dumps(commands[json.loads(line)]()), file=answers, flush=True)


class Stepper:
    """Optimiser steps of one config on its first batch (`Domain.first_inputs`)."""

    def __init__(self, config: Config):
        self.config = config
        self.index: int = 0
        self.inputs: Inputs = domain_of(config).first_inputs(config)
        model = build(config, self.inputs.vocab_size, self.inputs.picture)
        self.objective: Objective = build_objective(config, model, self.inputs.end_of_text).train()
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.objective.parameters(), lr=config.optim.lr, betas=config.optim.betas,
            weight_decay=config.optim.weight_decay, fused=True)

    def step(self) -> dict[str, Any]:
        """Take one optimiser step and return its wall-clock and CPU seconds."""
        start, cpu_start = time.perf_counter(), time.process_time()
        parts = self.config.training.accumulation
        for micro in range(parts):
            with casts_kept():
                (self.loss(micro) / parts).backward()
        if self.config.optim.grad_clip:
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.index += 1
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}

    def loss(self, micro: int = 0) -> Tensor:
        """The loss of a micro-batch of the current step."""
        part, total = self.inputs.micro_batches[micro], self.config.training.batch_size
        random = StepRandom(self.config.seed, self.index, start=micro * len(part), count=len(part), total=total)
        with Precision.of(self.config, "cpu").autocast():
            return self.objective(part, random).value

    def figures(self, base: int) -> dict[str, Any]:
        """Measurements that do not vary between steps. `base`: bytes of the process before the model was built."""
        peak = peak_rss()
        return {"saved_activation_bytes": kept_bytes(self.loss, self.objective)[0], "peak_rss_bytes": peak,
                "base_rss_bytes": base,
                "layer_forwards": self.objective.layer_forwards() * self.config.training.batch_size,
                "step_flops": self.step_flops()}

    def step_flops(self) -> int:
        """FLOPs of an optimiser step, at the actual sequence lengths of the batch."""
        training = FakeTraining(self.config.replace(**{"training.checkpoint_activations": False}), self.inputs)
        costs = [(weight, training.step(part, decisions)) for part in self.inputs.micro_batches
                 for weight, decisions in training.objective.decisions()]
        return round(sum(weight * (cost.forward_flops + cost.backward_flops) for weight, cost in costs))


def peak_rss() -> int:
    """Peak resident bytes of this program. On Linux read from /proc, because getrusage reports a peak that a child
    inherits across exec from its parent process."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return found[0] if found else peak_bytes()
