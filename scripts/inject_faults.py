"""Inject faults into runs of two processes; check that all end in time, say which rank and why, and lose no saved step.

    python scripts/inject_faults.py --num 200 --out runs/faults

Each case trains a tiny model in two processes over gloo on the CPU, forked from this one, which has imported torch. At
a random step a fault is put into a process, of one kind after another. Checked are the time until both have ended,
their exit codes, the sentence of every process that is able to say one, and, after the same command has been run again
without the fault, the weights: bit for bit those of an undisturbed run. Exit code 0 if all cases hold. The summary is
written to faults.json after each case.
"""

import argparse
import atexit
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from torch.distributed.checkpoint import HuggingFaceStorageWriter

from looped.cli import main as looped
from looped.errors import UserError
from looped.objectives import Loss
from looped.training import checkpoint, processes, train, trainer
from looped.training.checkpoint import list_checkpoints, load_tensors

CONFIG = """
objective: full
model: {{width: 16, num_heads: 2, num_prelude_layers: 1, num_core_layers: 1, num_coda_layers: 1}}
recurrence: {{mean: 2}}
data: {{path: [{text}], cache_dir: {cache}, vocab_size: 270, length: 16}}
optim: {{warmup_steps: 5, ema_decay: 0.9}}
training: {{batch_size: 4, budget: 60, threads: 1, log_every: 1, eval_every: 30, checkpoint_every: 10,
            lost_after: {limit}, shard: {shard}}}
evaluation: {{num_sequences: 4, prompt_length: 4, sample_length: 4}}
"""
LIMIT = 6.0
"""`training.lost_after`, in seconds."""
NUM = 2
GROUP_LIMIT = 10.0
"""Seconds that an exchange may take in a case of `limit exceeded`."""
AGAIN = "run the same command again"


@dataclass
class Case:
    """A fault in a process of a run, at the end of a step. pids: of the processes, by rank, or of the agent that has
    started them."""

    kind: str
    rank: int
    step: int
    folder: Path
    pids: list[int] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"


@dataclass(frozen=True)
class Fault:
    """A kind of fault. says: the sentence, a pattern, of every process that can say one; codes: exit codes of the
    process with the fault and of the others; patch: of that process, before it starts; common: of all; strike: an act
    on the processes at the step; seconds: until all have ended; saved: the step of the fault is saved; flags: of that
    process alone; mute: the others say nothing; still: the process does not end by itself; agent: torchrun starts the
    processes, and the fault is its own."""

    says: str
    codes: tuple[int, int]
    patch: Callable[[Case], None] = lambda case: None
    common: Callable[[], None] = lambda: None
    strike: Callable[[Case], None] | None = None
    seconds: float = 2 * LIMIT + 10
    saved: bool = False
    flags: Callable[[Case], list[str]] = lambda case: []
    mute: bool = False
    still: bool = False
    agent: bool = False


# ----------------------------------------------------------------------------- faults


def at_step(case: Case, act: Callable[[Any], None]) -> None:
    """Call `act(trainer)` before the step of the case."""
    plain = trainer.Trainer.train_step

    def train_step(self: Any) -> None:
        if self.done.step == case.step:
            act(self)
        plain(self)

    trainer.Trainer.train_step = train_step


def fail(error: BaseException) -> Callable[[Case], None]:
    def act(_: Any) -> None:
        raise error

    return lambda case: at_step(case, act)


def not_a_number(case: Case) -> None:
    """Every loss of one row is not a number from the step on."""
    plain = trainer.Trainer.run

    def run(self: Any, batch: Any, draws: Any) -> Loss:
        loss = plain(self, batch, draws)
        return replace(loss, value=loss.value * math.nan) if self.done.step == case.step else loss

    trainer.Trainer.run = run


def full_disk(case: Case) -> None:
    def write(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_step(case, lambda _: (setattr(checkpoint, "save_file", write),
                             setattr(HuggingFaceStorageWriter, "write_data", write)))


def slow_evaluation(seconds: float) -> Callable[[Case], None]:
    def patch(case: Case) -> None:
        plain = train.heldout_figures

        def slow(*arguments: Any, **named: Any) -> dict[str, float]:
            time.sleep(seconds)
            return plain(*arguments, **named)

        train.heldout_figures = slow

    return patch


def short_exchanges() -> None:
    """The limit of the group, half an hour or more, is one that an evaluation can pass in a test."""
    processes.timedelta = lambda **_: timedelta(seconds=GROUP_LIMIT)


def other_contents(case: Case) -> None:
    """The file of the text has other contents where the rank reads it."""
    plain = train.find_data
    train.find_data = lambda config: plain(config.replace(**{"data.path": [str(case.folder.parent / "other.txt")]}))


def own_folder(case: Case) -> None:
    """The rank is on a node whose disk is its own."""
    node = case.folder / f"node{case.rank}"
    node.mkdir(exist_ok=True)
    os.chdir(node)


def send(number: int, *, everyone: bool = False, twice: bool = False) -> Callable[[Case], None]:
    def strike(case: Case) -> None:
        for pid in case.pids if everyone else [case.pids[case.rank]]:
            for _ in range(1 + twice):
                os.kill(pid, number)

    return strike


def other_text(case: Case) -> list[str]:
    return ["--data.path", str(case.folder.parent / "other.txt")]


LOST = r"rank {rank} \(process \d+ on \S+\) is lost, .*" + AGAIN
SIGNALLED = r"SIGTERM: stopped after step \d+, which is saved"
FAULTS = {
    "two SIGTERMs to all": Fault(SIGNALLED, (143, 143), strike=send(signal.SIGTERM, everyone=True, twice=True),
                                   saved=True, mute=True),
    "SIGTERM to the agent": Fault(SIGNALLED, (1, 1), strike=send(signal.SIGTERM), saved=True, agent=True),
    "SIGTERM to one": Fault(SIGNALLED, (143, 143), strike=send(signal.SIGTERM), saved=True, mute=True),
    "SIGINT to all": Fault(SIGNALLED.replace("TERM", "INT"), (130, 130), strike=send(signal.SIGINT, everyone=True),
                           saved=True, mute=True),
    "SIGUSR1 to one": Fault("", (0, 0), strike=send(signal.SIGUSR1), saved=True, mute=True, seconds=60),
    "SIGKILL": Fault(LOST, (-signal.SIGKILL, 1), strike=send(signal.SIGKILL)),
    "frozen": Fault(LOST, (-signal.SIGKILL, 1), strike=send(signal.SIGSTOP), still=True),
    "disk full": Fault("cannot write checkpoint .*No space left on device", (2, 2), full_disk),
    "another seed": Fault("rank {rank} has seed 7, and rank 0 has 0", (2, 2), flags=lambda case: ["--seed", "7"]),
    "another text": Fault("rank {rank} has data.path .*other.txt", (2, 2), flags=other_text),
    "text differing on one rank": Fault("rank {rank} has fingerprint of the data .*; give every process the same data",
                                        (2, 2), other_contents),
    "another disk": Fault("rank {rank} has .* and rank 0 has .*; put the run .* all nodes share", (2, 2), own_folder),
    "NaN": Fault(r"the loss is nan at step {step} \(.*\); nothing was updated", (2, 2), not_a_number),
    "an error of the user's": Fault("rank {rank} ended: the disk of a node cannot be read", (2, 2),
                                    fail(UserError("the disk of a node cannot be read"))),
    "a bug": Fault("rank {rank} ended: KeyError: 'a bug'", (1, 1), fail(KeyError("a bug"))),
    "long evaluation": Fault("", (0, 0), slow_evaluation(2 * LIMIT), mute=True, seconds=60 + 6 * LIMIT),
    "limit exceeded": Fault("", (0, 0), slow_evaluation(1.5 * GROUP_LIMIT), short_exchanges, mute=True,
                            seconds=60 + 4 * GROUP_LIMIT),
}
ONLY_FIRST = {"none": ("disk full", "SIGTERM to the agent"), "fsdp": ("SIGTERM to the agent",)}
"""Faults of what the first process does for all, by `training.shard`."""
NEVER_FIRST = ("another seed", "another text", "text differing on one rank", "another disk")
"""Faults that are told as the other's, since all are compared with the first."""


# ----------------------------------------------------------------------------- processes


def start(case: Case, fault: Fault | None) -> None:
    """Fork the processes of a run, one of them with the fault, or an agent that starts them."""
    case.pids = []
    if fault is not None and fault.agent:
        case.pids.append(_fork(case, 0, lambda: _launch(case)))
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(NUM):
        case.pids.append(_fork(case, rank, lambda rank=rank: _train(case, fault, rank, port)))


def _fork(case: Case, rank: int, work: Callable[[], int]) -> int:
    """The process id of a fork that does `work()` and ends with the code that this returns."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(case.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(case.folder)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()
        os._exit(code)


def _train(case: Case, fault: Fault | None, rank: int, port: int) -> int:
    """Train as a process of the group; returns the exit code of the command."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM), "LOCAL_WORLD_SIZE": str(NUM),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    flags = []
    if fault is not None:
        fault.common()
        if rank == case.rank:
            fault.patch(case)
            flags = fault.flags(case)
    return looped([*command(case), *flags])


def _launch(case: Case) -> int:
    """Become torchrun, which starts the processes anew and passes its signals on to them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM), "-m", "--", "looped.cli"]
    os.execve(sys.executable, [sys.executable, *launcher, *command(case)], os.environ | {"ACCELERATE_USE_CPU": "1"})


def command(case: Case) -> list[str]:
    return ["train", str(case.folder.parent / "config.yaml"), "--run", "run"]


def wait(case: Case, seconds: float, without: int | None = None) -> dict[int, int]:
    """Exit codes of the processes that end within so many seconds; `without`: one that is not waited for."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while not {*range(len(case.pids))} - {without} <= {*codes} and time.monotonic() < deadline:
        for rank, pid in enumerate(case.pids):
            if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.02)
    return codes


def end(case: Case, codes: dict[int, int]) -> None:
    for rank, pid in enumerate(case.pids):
        if rank not in codes:
            os.kill(pid, signal.SIGKILL)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def last_step(case: Case) -> int:
    """The last step that the first process has logged."""
    text = case.log(0).read_text(encoding="utf-8") if case.log(0).exists() else ""
    found = re.findall(r"^step (\d+) .*loss", text, re.MULTILINE)
    return int(found[-1]) if found else -1


# ----------------------------------------------------------------------------- a case

def weights(run: Path) -> list[tuple[str, bytes]]:
    """The tensors of the newest checkpoint."""
    parts = (load_tensors(list_checkpoints(run)[0], part) for part in ("model", "ema", "optimizer"))
    return [(name, tensor.numpy().tobytes()) for part in parts for name, tensor in sorted(part.items())]


def check(case: Case, expected: list[tuple[str, bytes]]) -> dict[str, Any]:
    """Result of a case; `wrong` lists what does not hold."""
    fault = FAULTS[case.kind]
    case.folder.mkdir(parents=True)
    start(case, fault)
    if fault.strike is not None:
        deadline = time.monotonic() + 60
        while last_step(case) < case.step and time.monotonic() < deadline:
            time.sleep(0.005)
        fault.strike(case)
    begun = time.monotonic()
    codes = wait(case, fault.seconds + (60 if fault.strike is None else 0), case.rank if fault.still else None)
    seconds = time.monotonic() - begun
    ranks = range(len(case.pids))
    late = [rank for rank in ranks if rank not in codes and not (fault.still and rank == case.rank)]
    end(case, codes)
    wrong = [f"rank {rank} did not end" for rank in late]
    others = [rank for rank in ranks if rank != case.rank]
    if codes[case.rank] != fault.codes[0] or any(codes[rank] != fault.codes[1] for rank in others):
        wrong.append(f"exit codes {codes}")
    wrong += [f"rank {rank} says: {said}" for rank in ranks if (said := unsaid(case, fault, rank))]
    before = [path.name for path in list_checkpoints(case.run)]
    if fault.saved and not any(int(name.rpartition("-")[2]) >= case.step for name in before):
        wrong.append(f"step {case.step} is not among the checkpoints {before}")
    for rank in ranks:
        case.log(rank).rename(case.log(rank).with_suffix(".fault"))
    start(case, None)
    again = wait(case, 120)
    end(case, again)
    if any(again.values()):
        wrong.append(f"the same command ended with {again}")
    elif weights(case.run) != expected:
        wrong.append("other weights than those of an undisturbed run")
    return {"kind": case.kind, "rank": case.rank, "step": case.step, "seconds": round(seconds, 1), "codes": codes,
            "wrong": wrong}


def unsaid(case: Case, fault: Fault, rank: int) -> str:
    """The last lines of a process that should say the sentence and does not; empty if it does or cannot."""
    text = case.log(rank).read_text(encoding="utf-8", errors="replace")
    gone = rank == case.rank and fault.codes[0] == -signal.SIGKILL
    own = rank == case.rank and case.kind in ("a bug", "an error of the user's")
    if gone or own or (fault.mute and rank != 0) or not fault.says:
        return ""
    wanted = fault.says.replace("{rank}", str(case.rank)).replace("{step}", str(case.step))
    found = [line for line in text.splitlines() if re.search(wanted, line)]
    return "" if len(found) == 1 else " | ".join(text.splitlines()[-3:])[-400:]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--num", type=int, default=200, help="faults")
    parser.add_argument("--kinds", default=",".join(FAULTS), help=f"comma-separated, of: {', '.join(FAULTS)}")
    parser.add_argument("--seed", type=int, default=0, help="seed for ranks and steps")
    parser.add_argument("--shard", choices=["none", "fsdp"], default="none", help="training.shard of the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, number in {"text.txt": 3, "other.txt": 4}.items():
        lines = "".join(f"def f{i}(x):\n    return x * {i} + {i * i % 17}  # {number} of many\n\n" for i in range(400))
        (out / name).write_text(lines, encoding="utf-8", newline="")
    text, cache = (json.dumps(str(out / name)) for name in ("text.txt", "cache"))
    (out / "config.yaml").write_text(CONFIG.format(text=text, cache=cache, limit=LIMIT, shard=options.shard),
                                     encoding="utf-8", newline="")
    plain = Case("none", 0, 0, out / "undisturbed")
    plain.folder.mkdir()
    start(plain, None)
    codes = wait(plain, 300)
    end(plain, codes)
    if any(codes.values()):
        raise SystemExit(f"the undisturbed run ended with {codes}: {plain.log(0).read_text(encoding='utf-8')[-2000:]}")
    expected, draw, rows = weights(plain.run), random.Random(options.seed), []
    kinds = [kind.strip() for kind in options.kinds.split(",")]
    for number in range(options.num):
        kind = kinds[number % len(kinds)]
        rank = 0 if kind in ONLY_FIRST[options.shard] else 1 if kind in NEVER_FIRST else draw.randrange(NUM)
        case = Case(kind, rank, draw.randrange(1, 55), out / f"{number:03d}")
        rows.append(check(case, expected))
        print(f"{number:3d}  {kind}, rank {rank}, step {case.step}: {rows[-1]['seconds']} s"
              + "".join(f"\n     WRONG: {each}" for each in rows[-1]["wrong"]), flush=True)
        (out / "faults.json").write_text(json.dumps(rows, indent=1), encoding="utf-8", newline="")
        if not rows[-1]["wrong"]:
            shutil.rmtree(case.folder)
    for kind in kinds:
        seconds = [row["seconds"] for row in rows if row["kind"] == kind]
        wrong = sum(bool(row["wrong"]) for row in rows if row["kind"] == kind)
        if seconds:
            print(f"{kind}: {len(seconds)} faults, {wrong} wrong, {median(seconds):.1f} s (at most {max(seconds):.1f})")
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
