"""Seconds that a checkpoint keeps training waiting, written in the background and not, each in processes of their own.

    python scripts/save_time.py [--rounds 3] [--processes 1] [--width 1024]

A model of some 100 M parameters (1.2 GB with AdamW's moments) trains on short sequences. `blocked`: the call that
saves. `written`: until the checkpoint is complete. `step`, `meanwhile`: seconds of a step, median, without and during
the write. With several processes the model is sharded over them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from looped.config import load_config
from looped.training.train import open_trainer


def settings(width: int, background: bool, shard: str) -> dict:
    return {"objective": "ar", "model.width": width, "model.num_heads": 16, "model.num_prelude_layers": 0,
            "model.num_core_layers": 8, "model.num_coda_layers": 0, "data.path": __file__, "data.vocab_size": 300,
            "data.length": 8, "training.batch_size": 2, "training.budget": 1000, "training.budget_unit": "steps",
            "training.num_evals": 0, "training.checkpoint_every": 0, "training.keep_checkpoints": 1,
            "training.threads": 1, "training.background_saves": background, "training.shard": shard,
            "evaluation.num_sequences": 2, "evaluation.prompt_length": 2}


def measure(width: int, background: bool, shard: str) -> dict[str, float]:
    """One process: three checkpoints, of which the last is reported and the first apart."""
    with tempfile.TemporaryDirectory() as folder, open_trainer(
            load_config(None, settings(width, background, shard)), shared_folder(folder), quiet=True) as trainer:
        size = 4 * sum(p.numel() for p in trainer.objective.parameters())
        found = []
        for _ in range(3):
            alone = [timed(trainer.train_step) for _ in range(4)][1:]
            trainer.saver.reserve(trainer.tensors)
            if not found:
                trainer.saver.wait()
            start = time.perf_counter()
            trainer.save()
            blocked = time.perf_counter() - start
            during = []
            while trainer.saver.pending is not None and not trainer.saver.pending.done():
                during.append(timed(trainer.train_step))
            written = time.perf_counter() - start
            trainer.saver.wait()
            found.append({"blocked": blocked, "written": written, "step": median(alone),
                          "meanwhile": median(during or [float("nan")])})
        trainer.ended = 1
        return {"bytes": size * 3, "first": found[0]["blocked"], **found[-1]}


def shared_folder(own: str) -> Path:
    """The folder of the run, which all processes of a launcher share."""
    return Path(os.environ.get("SAVE_TIME_FOLDER", own)) / "run"


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--arm", choices=["true", "false"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    shard = "fsdp" if args.processes > 1 else "none"
    if args.arm is not None:
        found = measure(args.width, args.arm == "true", shard)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(found), flush=True)
        return
    results: dict[str, list[dict[str, float]]] = {"true": [], "false": []}
    for _ in range(args.rounds):
        for arm, runs in results.items():
            runs.append(json.loads(_run(args, arm).splitlines()[-1]))
    for arm, runs in results.items():
        line = "  ".join(f"{name} {median(run[name] for run in runs):.3f} "
                         f"({min(run[name] for run in runs):.3f} to {max(run[name] for run in runs):.3f})"
                         for name in ("first", "blocked", "written", "step", "meanwhile"))
        print(f"background_saves {arm}: {runs[0]['bytes'] / 1e9:.2f} GB, {args.processes} process(es): {line}")


def _run(args: argparse.Namespace, arm: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    command = [sys.executable, *(launcher if args.processes > 1 else []), __file__, "--arm", arm,
               "--processes", str(args.processes), "--width", str(args.width)]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SAVE_TIME_FOLDER": folder}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
