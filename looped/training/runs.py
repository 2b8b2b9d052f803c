"""The folder of a run: its config, where it came from, a lock against a second writer; and a finished run read back.

    runs/<name>/  config.yaml  stamp.json  tokenizer.json  data.json  metrics.jsonl  train.log  checkpoints/  latest
"""

import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import looped
from looped.config import Config, dump_config, load_config
from looped.data.heldout import HeldoutText
from looped.data.images import Scale
from looped.data.opening import Data, located
from looped.data.tokenizer import TextTokenizer, load_tokenizer
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import Objective, build_objective
from looped.storage import HOLDER, LOCK, SOFT_LOCK, hold, lacking, write_text
from looped.training.checkpoint import (
    DamagedError,
    check,
    checkpoint_path,
    list_checkpoints,
    load_module,
    load_tensors,
    newest_good,
    remove_leftovers,
    set_aside,
)
from looped.training.counters import Counters
from looped.training.identity import Identity, label_of, open_own, recall_data
from looped.training.restart import BUDGET, changes_of, is_one_of, start_of

FREE_AFTER_TRAINING = ("seed", "evaluation", "training.threads", "denoise.solver", "denoise.schedule", "denoise.bridge",
                       "denoise.bridge_top_k", "denoise.start", "denoise.restart_level", "denoise.settle_above",
                       "denoise.guidance", "noprop.solver", "recurrence.damping", "masked.schedule",
                       "images.max_heldout", "data.documents")
"""Settings, or sections of them, that a trained run can be evaluated and sampled with."""

CONFIG, STAMP, TOKENIZER = "config.yaml", "stamp.json", "tokenizer.json"
CHANGES = "changes"
"""In the stamp: settings that changed when the run was gone on with, as {when, step, setting, old, new}."""
ABANDONED = "abandoned"
"""Among them, where the run went on from an earlier step than its newest: that one, whose end was set aside."""
OURS = (LOCK, SOFT_LOCK, HOLDER, STAMP)
"""The files that a folder may hold before it has a config.yaml."""


@contextmanager
def open_run(config: Config, run_dir: str | Path, *, device: str = "cpu") -> Iterator[Path]:
    """Hold a run's folder for writing: created for `config` or, with a config.yaml in it that `restart` takes for the
    same run, gone on with.

    Raises UserError when another process holds it, when its config differs (naming the first setting that does), when
    it is the folder of something else, or when it cannot be written.
    """
    path = Path(run_dir)
    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(path))
            warn_of_lost_guarantees(path)
            _prepare(path, config, device)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"run {path} is a file or lies under one; choose another --run") from None
        except OSError as error:
            raise UserError(f"cannot write to run {path}: {error.strerror or error}; "
                            f"free space or permissions, or choose another --run") from None
        yield path


def warn_of_lost_guarantees(path: Path) -> None:
    """One warning where the file system under a run has not all that a run is promised."""
    if lost := lacking(path):
        warnings.warn(f"run {path} is on a file system without {'; without '.join(lost)}", stacklevel=2)


def _prepare(path: Path, config: Config, device: str) -> None:
    remove_leftovers(path)
    if (path / CONFIG).exists() and list_checkpoints(path):
        _go_on(path, config)
        return
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name not in OURS)
    if strangers and CONFIG not in strangers:
        raise UserError(f"run {path} has no {CONFIG} but holds '{strangers[0]}'; choose another --run")
    # The stamp first: a folder with a config.yaml is complete. A start that saved nothing leaves nothing to protect, so
    # its config may be corrected.
    write_text(path / STAMP, json.dumps(stamp(config, device), indent=1))
    write_text(path / CONFIG, dump_config(config))


def _go_on(path: Path, config: Config) -> None:
    """Take over the settings that may change; the stamp keeps what they were, and config.yaml what they are."""
    before = load_config(path / CONFIG)
    changes = changes_of(path, before, config)
    if not changes:
        return
    (step, newest), stamped = start_of(path, before, config), read_stamp(path)
    now = [{"when": _now(), "step": step, **asdict(change)} | ({ABANDONED: newest} if step < newest else {})
           for change in changes]
    write_text(path / STAMP, json.dumps(stamped | {CHANGES: [*stamped.get(CHANGES, []), *now]}, indent=1))
    budget = before.training.budget
    if step < newest:
        moved = set_aside(path, step, why=f"budget-{budget}")
        warnings.warn(f"run {path} goes on from step {step}, after which its learning rate began to follow "
                      f"training.budget {budget}; the end it had is kept as {moved[0]}", stacklevel=2)
    write_text(path / CONFIG, dump_config(config))


def stamp(config: Config, device: str) -> dict[str, Any]:
    """Where a run comes from: code, versions, machine, command."""
    return {
        "created": _now(),
        **_git_state(),
        "versions": versions(),
        "device": device,
        "threads": torch.get_num_threads(),
        "machine": platform.platform(),
        "argv": sys.argv,
        "folder": os.getcwd(),
        "seed": config.seed,
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide what a run computes; None where one is missing."""
    return {"python": platform.python_version()} | {name: _version(name) for name in (
        "looped", "torch", "accelerate", "safetensors", "tokenizers", "numpy", "xformers")}


def read_stamp(path: str | Path) -> dict[str, Any]:
    """Where a run comes from, as far as it is known."""
    try:
        found = json.loads((Path(path) / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def changed_since_start(path: Path, step: int) -> dict[str, Any]:
    """Setting -> the value that a run started with, of those which changed since and decide the figures of its
    checkpoint of `step`: settings of evaluation, and a budget that gave its later steps other weights."""
    found = {}
    for change in reversed(read_stamp(path).get(CHANGES, [])):
        other_weights = change["setting"] == BUDGET and ABANDONED in change and step > change["step"]
        if other_weights or is_one_of(change["setting"], FREE_AFTER_TRAINING):
            found[change["setting"]] = change["old"]
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any]:
    """Commit and dirty flag of the source that runs; null where it is not a git checkout."""
    source = Path(looped.__file__).parent
    sha = _git(source, "rev-parse", "HEAD")
    tracked = _git(source, "ls-files", "--error-unmatch", "__init__.py") if sha else None
    if not tracked:  # an installed copy that happens to lie inside somebody's repository
        return {"git_sha": None, "git_dirty": None}
    return {"git_sha": sha, "git_dirty": bool(_git(source, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def save_tokenizer(path: Path, tokenizer: TextTokenizer) -> None:
    """Keep the tokenizer with the run, so that generating text needs no corpus. A start that saved no checkpoint may
    have left that of another text."""
    if not (path / TOKENIZER).exists() or not list_checkpoints(path):
        write_text(path / TOKENIZER, tokenizer.json())


def own_tokenizer(path: Path) -> TextTokenizer | None:
    """That of a run on text that has been trained; nothing else may encode what it reads."""
    return load_tokenizer(path / TOKENIZER) if (path / TOKENIZER).exists() and list_checkpoints(path) else None


def started_in(path: str | Path) -> Path:
    """The folder that the relative paths of a run's config start from: where training was started; the current folder
    for runs that do not remember it."""
    return Path(read_stamp(path).get("folder") or ".")


@dataclass
class Run:
    """A trained run: `objective` in evaluation mode (its `.model` is the language model), `step` it was saved at and
    what had been `spent` by then, `identity` of what it was trained on. `other_data`: it may be measured on what its
    config leads to by now."""

    path: Path
    config: Config
    step: int
    objective: Objective
    identity: Identity
    spent: Counters
    other_data: bool = False
    _given: Data | HeldoutText | None = None

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.objective.parameters()).device

    @property
    def data(self) -> Data | HeldoutText:
        """The run's text (`.train`, `.heldout`, `.bytes_per_token`), its task (`.task`, `.heldout(num, difficulty)`) or
        its images (`.images`, `.heldout(batch_size)`); prepared when first asked for. It can be set, as to what `train`
        was given in Python.

        Text is encoded by the run's own tokenizer; where it is no longer to be had, its tokens may be in the cache.
        Raises UserError where the config leads to other data than the run was trained on, unless `other_data`.
        """
        return self._own if self._given is None else self._given

    @data.setter
    def data(self, data: Data | HeldoutText) -> None:
        self.identity.check_numbers(data, self.path, self.tokenizer if data.tokenizer is not None else None)
        self._given = data

    @cached_property
    def _own(self) -> Data:
        trained, folder = load_config(self.path / CONFIG), started_in(self.path)
        return open_own(self.path, located(self.config, folder), trained=located(trained, folder),
                        identity=self.identity, other_data=self.other_data, tokenizer=own_tokenizer(self.path))

    @property
    def measured_on(self) -> str | None:
        """The name of the data, where they are not those that it was trained on."""
        own = self._given is None and not self.other_data
        return None if own or self.identity.matches(self.data) else label_of(self.data)

    @property
    def scale(self) -> Scale:
        """Of the images that it was trained on; they are read only where it does not remember."""
        return self.identity.scale or self.data.images.scale

    @property
    def class_names(self) -> Sequence[str]:
        """Those of the images that it was trained on."""
        return self.identity.facts.get("classes") or self.data.images.class_names

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The run's own copy of its tokenizer, which needs no text."""
        return load_tokenizer(self.path / TOKENIZER)


def load_run(path: str | Path, *, ema: bool = True, step: int | None = None, device: str | torch.device = "cpu",
             settings: Mapping[str, Any] | None = None, data: Data | HeldoutText | None = None,
             other_data: bool = False) -> Run:
    """Read a run's newest whole checkpoint, or that of `step`; with its averaged weights, if it has some and `ema`.

    settings: changes to the run's config, of those in `FREE_AFTER_TRAINING`. data: what to measure the run on, instead
    of what its config leads to. other_data: the latter may differ from what it was trained on. Raises UserError when
    there is no run, no (whole) checkpoint, weights that do not fit the config, or a setting that training has fixed.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is not a run: it has no {CONFIG}; pass the folder that `looped train` wrote")
    config = _changed(path, settings or {})
    checkpoint, state = _choose_checkpoint(path, step)
    name = "ema" if ema and (checkpoint / "ema.safetensors").exists() else "model"
    tensors = load_tensors(checkpoint, name)
    identity = recall_data(path, state)
    model = build(config, identity.vocab_size, identity.picture)
    objective = build_objective(config, model, _end_of_text(path, state))
    load_module(objective, tensors, checkpoint / f"{name}.safetensors")
    run = Run(path, config, state["step"], objective.to(device).eval(), identity, Counters.of(state), other_data)
    if data is not None:
        run.data = data
    return run


def identity_of(path: str | Path) -> Identity:
    """The data that the newest whole checkpoint of a run was trained on. Raises UserError where there is none."""
    return recall_data(Path(path), _choose_checkpoint(Path(path), None)[1])


def _end_of_text(path: Path, state: Mapping[str, Any]) -> int | None:
    """The token that ends a document of text; older runs have it in their tokenizer alone."""
    if "end_of_text" in state or not (path / TOKENIZER).is_file():
        return state.get("end_of_text")
    return load_tokenizer(path / TOKENIZER).end_of_text


def _changed(path: Path, settings: Mapping[str, Any]) -> Config:
    config = load_config(path / CONFIG, settings)  # first, so that a misspelt setting is named
    for name in settings:
        if not is_one_of(name, FREE_AFTER_TRAINING):
            raise UserError(f"--{name} was fixed when {path} was trained; what can be changed is "
                            f"{', '.join(FREE_AFTER_TRAINING)}")
    return config


def _choose_checkpoint(path: Path, step: int | None) -> tuple[Path, dict[str, Any]]:
    if step is None:
        found = newest_good(path, lambda line: print(line, file=sys.stderr))
        if found is None:
            raise UserError(f"run {path} has no checkpoint yet; train it, or set training.checkpoint_every lower")
        return found
    chosen = checkpoint_path(path, step)
    if not chosen.is_dir():
        steps = ", ".join(str(int(p.name.removeprefix("step-"))) for p in reversed(list_checkpoints(path))) or "none"
        raise UserError(f"run {path} has no checkpoint of step {step}; it has: {steps}")
    try:
        return chosen, check(chosen)
    except DamagedError as reason:
        raise UserError(f"checkpoint {chosen} is damaged: {reason}; choose another step") from None
