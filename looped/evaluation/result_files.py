"""Files of evaluation results: JSON lines to which every evaluation of a run adds, even several at the same time.

    DIR/eval/depth.jsonl     one line per figure: {step, metric, depth, mean, ci_low, ci_high, n, ...}
    DIR/eval/examples.jsonl  one value per held-out sequence (or problem, or image), for paired comparisons
    DIR/eval/sequences.jsonl their ids, in the same order: document and offset of texts, seed and index of problems
    DIR/eval/samples.jsonl   prompts and their continuations at each depth; `sequence` is the index of the prompt's
    DIR/eval/tokens.parquet  with --per-token: the loss of each token (looped.evaluation.token_losses)
    DIR/eval/probes.jsonl    with --probes: their figures, and one sentence per failure
    DIR/eval/tasks.jsonl     with --tasks: {task, metric, filter, depth, mean, ...}; task_examples.jsonl per question

Each line has the `step` of its checkpoint and the `device` and `dtype` of the measurement. It has `settings` if any
were changed for the evaluation, `data` if they are not the run's own, and `run` if the folder is not the run's own. Of
lines with equal `KEYS` only the newest is kept.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from looped.atomic_files import Lock, lock_for, write_text
from looped.config import Config, dump_config
from looped.errors import UserError
from looped.evaluation.metric_rows import Row

ROWS, EXAMPLES, SAMPLES = "eval/depth.jsonl", "eval/examples.jsonl", "eval/samples.jsonl"
SEQUENCES, PROBES = "eval/sequences.jsonl", "eval/probes.jsonl"
TASKS, TASK_EXAMPLES = "eval/tasks.jsonl", "eval/task_examples.jsonl"
IDENTITY = ("step", "settings", "data", "run")
"""The keys that identify an evaluation."""
TASK_KEYS = (*IDENTITY, "task", "metric", "filter", "depth", "num_fewshot", "limit")
KEYS = {ROWS: (*IDENTITY, "metric", "depth", "difficulty", "sigma", "by", "twin", "trajectories"),
        EXAMPLES: (*IDENTITY, "metric", "depth", "difficulty", "by", "twin", "trajectories"),
        SEQUENCES: (*IDENTITY, "difficulty"), SAMPLES: (*IDENTITY, "depth"), PROBES: IDENTITY,
        TASKS: TASK_KEYS, TASK_EXAMPLES: TASK_KEYS}
"""File -> the keys by which a new line replaces old ones."""
SELECTING = ("evaluation.depths", "evaluation.difficulties", "evaluation.sample_depths", "evaluation.batch_size",
             "training.threads")
"""Settings that select which figures are measured, or how fast, and change no figure."""

Line = dict[str, Any]


def changed_settings(trained: Config, evaluated: Config, flags: Mapping[str, Any] | None = None, *,
                     since: Mapping[str, Any] | None = None) -> str:
    """The settings that affect an evaluation's figures and differ from those its run was started with, as
    `denoise.solver=heun`; then the set ones of `flags`, which affect figures too. `since`: the starting values of
    settings that have changed in the run's config since."""
    before, after = (dict(_flat(config.model_dump(mode="json"))) for config in (trained, evaluated))
    before |= since or {}
    changed = {name: value for name, value in after.items() if value != before.get(name) and name not in SELECTING}
    changed |= {name: value for name, value in (flags or {}).items() if value}
    return " ".join(f"{name}={value if isinstance(value, str) else json.dumps(value)}"
                    for name, value in changed.items())


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class EvaluationFiles:
    """The lines of one evaluation in a folder: of the checkpoint of `step`, with `settings` changed. `about`: further
    keys of every line; `data` and `run` among them also identify the evaluation."""

    def __init__(self, folder: Path, step: int, settings: str = "", *, about: Mapping[str, Any] | None = None):
        self.folder = folder
        self.step = step
        self.settings = settings
        self.common: Line = {"step": step} | ({"settings": settings} if settings else {}) | dict(about or {})

    def check(self, config: Config) -> None:
        """Check that all files can be written, before anything is computed. A folder that is not a run's gets the
        config, which plots need. Raises UserError."""
        with writing_to(self.folder):
            for folder in (self.folder, *(self.folder / name for name in ("eval", "plots"))):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            for name in KEYS:
                if (self.folder / name).is_dir():
                    raise IsADirectoryError(None, f"{name} is a folder")
            with self.lock():
                if not (self.folder / "config.yaml").exists():
                    write_text(self.folder / "config.yaml", dump_config(config))

    def keep(self, rows: Sequence[Row] = (), examples: Sequence[Line] = (), samples: Sequence[Line] = ()) -> None:
        """Add a finished part of the evaluation. Raises UserError."""
        self.add({ROWS: [row.as_dict() for row in rows], EXAMPLES: examples, SAMPLES: samples})

    def add(self, files: Mapping[str, Iterable[Line]]) -> None:
        """Add lines and keep those of other evaluations; nothing is lost if two write at the same time."""
        with writing_to(self.folder), self.lock():
            for name, lines in files.items():
                merged = merge(read_lines(self.folder / name), [self.common | line for line in lines], KEYS[name])
                if merged:
                    write_text(self.folder / name, "".join(json.dumps(line) + "\n" for line in merged))

    def show(self, rows: Sequence[Row]) -> None:
        """Print rows as lines of JSON."""
        print("\n".join(json.dumps(self.common | row.as_dict()) for row in rows))

    def read(self, name: str) -> list[Line]:
        """The lines of this evaluation, whenever they were measured."""
        return [line for line in read_lines(self.folder / name)
                if all(line.get(name) == self.common.get(name) for name in IDENTITY)]

    def lock(self) -> Lock:
        """The lock to hold while files are updated, and while plots are drawn."""
        return lock_for(self.folder / "eval" / ".lock")

    def contents(self, name: str = ROWS) -> str:
        """Phrase on the depths that a file contains."""
        depths = sorted({line["depth"] for line in self.read(name) if "depth" in line})
        held = f"depth {', '.join(map(str, depths))} of step {self.step}" if depths else "nothing of this evaluation"
        return f"{self.folder / name} holds {held}"


def merge(old: Sequence[Line], new: Sequence[Line], key: Sequence[str]) -> list[Line]:
    """The old lines whose key no new line has, then the new lines."""
    replaced = {tuple(line.get(name) for name in key) for line in new}
    return [line for line in old if tuple(line.get(name) for name in key) not in replaced] + list(new)


def read_lines(path: Path) -> list[Line]:
    """The objects of a file of JSON lines; none if there is no file. Damaged lines are left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(text))
    return [line for line in found if isinstance(line, dict)]


def read_rows(run: Path) -> list[Line]:
    """All rows of `looped eval` in a folder, of all checkpoints and settings. Raises UserError."""
    path = run / ROWS
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows or not all(isinstance(row, dict) and "metric" in row for row in rows):
            raise ValueError
    except OSError:
        raise UserError(f"{run} has no {ROWS}; measure it with looped eval {run}") from None
    except ValueError:
        raise UserError(f"{path} is damaged; rebuild it with looped eval {run}") from None
    return rows


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Context that turns an OSError into a UserError on a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the evaluation to {folder}: {error.strerror or error}; free space or "
                        f"permissions, or choose another folder with --out") from None

