"""Output of a run in training: metrics.jsonl, train.log, plain lines or a progress bar, and Weights & Biases."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from looped.atomic_files import of_run, write_text
from looped.config import Config
from looped.errors import UserError
from looped.output import leave_stdout
from looped.training.runs import CHANGES, STAMP

METRICS, LOG = "metrics.jsonl", "train.log"
TIMING = ("seconds", "tokens_per_second", "peak_bytes")
"""Fields of metrics.jsonl that differ between two runs of the same command; all others are a function of the config."""

COSTS = ("step", "tokens", "layer_forwards", "seconds", "peak_bytes")
"""The cost of training, as returned by `costs_of`."""


class Meter:
    """Means over the steps since the last log line; the sums are saved, so that a resumed run logs the same line."""

    def __init__(self, sums: Mapping[str, list[float]] | None = None):
        self.sums: dict[str, list[float]] = {name: list(pair) for name, pair in (sums or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + value, count + 1]

    def merge(self, others: list[dict[str, list[float]]]) -> None:
        """Add the sums of other processes."""
        for sums in others:
            for name, (total, count) in sums.items():
                mine = self.sums.get(name, (0.0, 0))
                self.sums[name] = [mine[0] + total, mine[1] + count]

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items()}


class Monitor:
    """Writes a run's lines, on the first process only. quiet: only to its files."""

    def __init__(self, run_dir: Path, config: Config, *, main: bool = True, quiet: bool = False):
        self.run_dir = run_dir
        self.main = main
        self.quiet = quiet
        self.bar: Any = None
        self.wandb: Any = None
        if main:
            self.bar = _start_bar() if sys.stdout is not None and sys.stdout.isatty() and not quiet else None
            self.wandb = start_wandb(config, run_dir) if config.training.wandb != "off" else None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if exception[0] is None else 1)

    def rewind(self, step: int) -> None:
        """Delete what was logged after `step`, since training repeats it."""
        if self.main:
            keep_until(self.run_dir / METRICS, step)

    def evaluated(self, step: int) -> bool:
        """False if metrics.jsonl, which is the first process's, lacks the evaluation of a step."""
        path = self.run_dir / METRICS
        return not self.main or (path.exists() and any(line["kind"] == "heldout" and line["step"] == step
                                     for line in read_metrics(self.run_dir)))

    def say(self, line: str) -> None:
        """A line for people, on the terminal and in train.log."""
        if not self.main:
            return
        append(self.run_dir / LOG, line + "\n")
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        elif not self.quiet:
            self._print(line)

    def _print(self, line: str) -> None:
        """A line on the standard output. Training goes on, without further lines, if its reader has gone."""
        try:
            print(line, flush=True)
        except BrokenPipeError:
            self.quiet = True
            leave_stdout()
        except OSError as error:
            leave_stdout()
            raise UserError(f"cannot print to the standard output: {error.strerror or error}; free space where it "
                            f"goes, then run the same command again to resume") from None

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """A line for programs: {"kind": "train" | "heldout", "step", ...}."""
        if not self.main:
            return
        append(self.run_dir / METRICS, json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.wandb is not None:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def progress(self, step: int, fraction: float, values: Mapping[str, float]) -> None:
        """A line of training: in the progress bar on a terminal, else printed; always in train.log."""
        if not self.main:
            return
        line = f"step {step}  {100 * min(fraction, 1):.1f}%  " + "  ".join(
            f"{name} {_shorten(values[name])}" for name in ("loss", "grad_norm", "lr", "tokens_per_second")
            if name in values)
        if self.bar is None:
            self.say(line)
        else:
            append(self.run_dir / LOG, line + "\n")
            self.bar.update(self.bar.task_ids[0], completed=fraction, description=line)


def _shorten(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def append(path: Path, text: str) -> None:
    """Append to a file of a run; what UTF-8 lacks, as names of files may have it, is escaped. Raises UserError if
    writing fails."""
    with of_run(path), open(path, "a", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(text)


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step` (and an incomplete last line), so that each step is there once.

    Raises UserError if writing fails."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if kept != lines:
        with of_run(path):
            write_text(path, "".join(kept))


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl."""
    lines = (Path(run) / METRICS).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


def costs_of(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The total cost of training; the peak is the maximum over the processes that trained the run."""
    trained = [line for line in lines if line["kind"] == "train"]
    return {name: trained[-1][name] for name in COSTS[:-1]} | {"peak_bytes": max(t["peak_bytes"] for t in trained)}


def _step_of(line: str) -> float:
    """The step of a line; infinity if it is not a complete line of metrics.jsonl."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _start_bar():
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bar = Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn(),
                   TimeRemainingColumn(), transient=False)
    bar.add_task("starting", total=1.0)
    bar.start()
    return bar


def _first_stamp(run_dir: Path) -> str:
    """The stamp as first written, without later changes of settings."""
    stamp = json.loads((run_dir / STAMP).read_text(encoding="utf-8"))
    return json.dumps({key: value for key, value in stamp.items() if key != CHANGES}, indent=1)


def start_wandb(config: Config, run_dir: Path) -> Any:
    """The Weights & Biases run of a folder, which is continued if it exists."""
    try:
        import wandb
    except ImportError:
        raise UserError(f"training.wandb {config.training.wandb} needs the package; "
                        f"pip install wandb, or set training.wandb to off") from None
    identity = hashlib.sha256(_first_stamp(run_dir).encode()).hexdigest()[:12]
    try:
        return wandb.init(project="looped", name=run_dir.resolve().name, id=identity, resume="allow",
                          mode=config.training.wandb, dir=str(run_dir), config=config.model_dump(mode="json"))
    except wandb.errors.Error as error:
        raise UserError(f"training.wandb {config.training.wandb} failed: {' '.join(str(error).split())}; "
                        f"set it to offline or off") from None
