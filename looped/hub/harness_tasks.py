"""Tasks of lm-evaluation-harness, loaded by name or from a YAML file and measured at each depth.

Prompts, answers and metrics are the harness's own; the run answers through `looped.hub.harness`.
"""

import difflib
import logging
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from looped.errors import UserError, one_line
from looped.evaluation.benchmarks import Figure, Line, TaskRow
from looped.training.runs import Run

GUESSED = ("acc", "acc_norm", "acc_bytes")
"""Multiple-choice metrics whose chance level is one over the number of answers."""


@dataclass(frozen=True)
class Part:
    """The results at one depth: rows of metrics, and the values for single questions."""

    rows: list[TaskRow]
    examples: list[Line]


class Benchmarks:
    """Loaded tasks, with one model per depth. Before anything is written, raises UserError if lm_eval is missing, for
    tasks that it does not know or cannot load, and for a run that cannot answer them."""

    def __init__(self, names: str, run: Run, depths: Sequence[int], *, limit: int | None = None,
                 num_fewshot: int | None = None, max_length: int | None = None):
        harness = _import_harness()
        self.limit = limit
        self.run = run
        self.models: list[Any] = harness.models_of(run, depths, max_length=max_length)
        with _quiet():
            self.loaded: Any = _load([name.strip() for name in names.split(",") if name.strip()])
            for name, task in self.loaded["tasks"].items():
                _ask_examples(task, num_fewshot)
                self._rehearse(name, task)

    def _rehearse(self, name: str, task: Any) -> None:
        """Builds the first question of a task without asking it, so that errors show early."""
        with _in_one_sentence(name):
            task.build_all_requests(limit=1, rank=0, world_size=1)
            for instance in task.instances:
                if instance.request_type == "generate_until":
                    self.models[0].manner(instance.args[1])

    def measure(self) -> Iterator[Part]:
        """The results of all tasks, depth by depth."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.evaluator import evaluate

        for model in self.models:
            for task in self.loaded["tasks"].values():  # the same few-shot examples at each depth
                task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            with _quiet():
                results = evaluate(model, self.loaded, limit=self.limit, bootstrap_iters=0, log_samples=True)
            yield _part(results, model.depth, self.limit)
        if num_cut := self.models[0].num_cut:
            warnings.warn(f"{num_cut} prompts have more than {self.models[0].max_length} tokens with their answers and "
                          f"were truncated from the left; --max-length sets this limit", stacklevel=2)

    @property
    def facts(self) -> dict[str, str]:
        """Names and values for the head of a report: harness, objective and context length."""
        return {"lm-evaluation-harness": version("lm_eval"), "objective": self.run.config.objective,
                "tokens of a question at most": str(self.models[0].max_length)}


def _import_harness():
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("--tasks needs lm-evaluation-harness; pip install 'looped[harness]'") from None
    from looped.hub import harness

    return harness


# ---- loading ---------------------------------------------------------------------------------------------------------


def _load(names: Sequence[str]) -> Any:
    """Loads tasks and groups by names and files. Raises UserError."""
    if not names:
        raise UserError("--tasks names no task; write for instance hellaswag,arc_easy or the path of a YAML file")
    files = {name: Path(name).expanduser().resolve() for name in names if Path(name).expanduser().is_file()}
    for name in names:
        if name not in files and (name.endswith((".yaml", ".yml")) or "/" in name):
            raise UserError(f"--tasks {name} is not a file; give the path of a task's YAML file, or the name of a task")
    specs = [_group_of(files[name]) or str(files[name]) if name in files else name for name in names]
    folders = sorted({file.parent for file in files.values()}) or None
    if len(files) == len(names):  # without lm_eval's own tasks, which take seconds to list
        try:
            return _loaded(names, specs, folders, defaults=False)
        except UserError:
            if not any(map(_group_of, files.values())):
                raise
    return _loaded(names, specs, folders, defaults=True)


def _group_of(file: Path) -> str | None:
    """The name of the group that a file defines, if any; lm_eval finds groups only by name."""
    found = re.search(r"^group\s*:\s*(\S+)", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found and found[1].strip("'\"")


def _loaded(names: Sequence[str], specs: Sequence[str], folders: Sequence[Path] | None, *, defaults: bool) -> Any:
    """The tasks of `specs`; `names` are for error messages."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folders, include_defaults=defaults)
    found = []
    for name, spec in zip(names, specs, strict=True):
        if name == spec and spec not in manager.all_tasks and not Path(spec).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise UserError(f"lm_eval knows no task {name!r}" + (f"; did you mean {near[0]!r}?" if near else
                                                                 "; `lm_eval ls tasks` lists those it knows"))
        with _in_one_sentence(name):
            found += _topmost(manager.load([spec]))
    with _in_one_sentence(", ".join(names)):
        return manager.load(found)


def _topmost(loaded: Any) -> list[Any]:
    """The tasks and groups that are in no other group."""
    inside = {name for children in loaded["group_map"].values() for name in children}
    whole = {**loaded["groups"], **loaded["tasks"]}
    return [each for name, each in whole.items() if name not in inside]


@contextmanager
def _in_one_sentence(name: str) -> Iterator[None]:
    """Turns errors of a task's file, code or data into a one-sentence UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # from yaml, jinja2, datasets, or Python code next to the file
        raise UserError(f"task {name} cannot be loaded ({type(error).__name__}: {one_line(error)}); fix its file, or "
                        f"check that its data can be reached") from None


def _ask_examples(task: Any, num_fewshot: int | None) -> None:
    """Sets the number of few-shot examples as lm_eval's simple_evaluate does: a task that says 0 keeps 0."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses logs and progress bars, seeds the global generators as lm_eval does, and restores all of it."""
    import datasets
    from lm_eval.api import task
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels, states = [logger.level for logger in loggers], (random.getstate(), np.random.get_state())  # noqa: NPY002
    had_bars, bars = datasets.is_progress_bar_enabled(), task.tqdm
    task.tqdm = partial(bars, disable=True)  # it offers no other way
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
    try:
        yield
    finally:
        task.tqdm = bars
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


# ---- results ---------------------------------------------------------------------------------------------------------


def _part(results: Mapping[str, Any], depth: int, limit: int | None) -> Part:
    """The results of all tasks and groups at a depth."""
    rows, examples = [], []
    parents = {child: group for group, children in results["group_subtasks"].items() for child in children}
    for task, metrics in results["results"].items():
        samples = [sample for leaf in _leaves(task, results["group_subtasks"])
                   for sample in results["samples"].get(leaf, [])]
        for key, figure in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(figure, int | float):
                continue
            where = {"task": task, "depth": depth, "group": parents.get(task), "limit": limit,
                     "filter": kind if kind != "none" else None, "num_fewshot": results["n-shot"].get(task, 0)}
            mine = [sample for sample in samples if sample["filter"] == kind and metric in sample]
            row, lines = _figure(metric, figure, mine, where, results).lines()
            rows.append(row)
            examples += lines
    return Part(rows, examples)


def _leaves(task: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group; for a task, the task itself."""
    if not children.get(task):
        return [task]
    return [leaf for child in children[task] for leaf in _leaves(child, children)]


def _figure(metric: str, figure: float, samples: Sequence[Mapping[str, Any]], where: Line,
            results: Mapping[str, Any]) -> Figure:
    from lm_eval.api.metrics import mean_stderr

    scores = [sample[metric] for sample in samples]
    higher = results["higher_is_better"].get(where["task"], {}).get(metric)
    plain = len(scores) > 1 and all(isinstance(score, int | float) for score in scores)
    stderr = float(mean_stderr(scores)) if plain else None
    kinds = {results["configs"].get(leaf, {}).get("output_type")
             for leaf in _leaves(where["task"], results["group_subtasks"])}
    return Figure(metric, float(figure), scores, higher is not False, _chance(metric, samples, kinds), where, stderr)


def _chance(metric: str, samples: Sequence[Mapping[str, Any]], kinds: set[str | None]) -> float | None:
    """The score of random guessing: one over the number of answers, 0 for generated answers; None if not known."""
    if kinds == {"generate_until"} and metric == "exact_match":
        return 0.0
    if kinds != {"multiple_choice"} or metric not in GUESSED or any("acc_mutual_info" in each for each in samples):
        return None
    return sum(1 / len(sample["arguments"]) for sample in samples) / len(samples) if samples else None
