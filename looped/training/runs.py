"""The folder of a run: its config, its provenance, a lock against a second writer; and the loading of a trained run.

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
from looped.atomic_files import HOLDER, LOCK, SOFT_LOCK, hold, lacking, of_run, write_text
from looped.config import Config, dump_config, load_config
from looped.data.eval_text import HeldoutText
from looped.data.from_config import Data, located
from looped.data.images import Normalizer
from looped.data.token_numbers import TokenNumbers
from looped.data.tokenizer import TextTokenizer, load_tokenizer
from looped.errors import UserError
from looped.models.build import build
from looped.nn.checks import kind_of
from looped.objectives import Objective, build_objective
from looped.precision import Precision
from looped.training.checkpoint import (
    DamagedError,
    check,
    checkpoint_path,
    list_checkpoints,
    load_module,
    load_tensors,
    newest_good,
    part_of,
    remove_leftovers,
    set_aside,
)
from looped.training.counters import Counters
from looped.training.data_identity import Identity, label_of, open_own, recall_data
from looped.training.resume_rules import BUDGET, Change, changes_of, is_one_of, start_of

FREE_AFTER_TRAINING = ("seed", "evaluation", "training.threads", "denoise.solver", "denoise.schedule", "denoise.bridge",
                       "denoise.bridge_top_k", "denoise.start", "denoise.restart_level", "denoise.settle_above",
                       "denoise.guidance", "noprop.solver", "recurrence.damping", "masked.schedule",
                       "images.max_heldout", "data.documents", "model.attention")
"""Settings or sections that may change when a trained run is evaluated or sampled."""

CONFIG, STAMP, TOKENIZER = "config.yaml", "stamp.json", "tokenizer.json"
CHANGES = "changes"
"""Key of the stamp for settings that changed when the run was resumed, as {when, step, setting, old, new}."""
ABANDONED = "abandoned"
"""Key of such a change for the newest step, if the run resumed from an earlier one and set later checkpoints aside."""
NUMBERS = "precision"
"""Key of the stamp for the `Precision` of training, and the setting of a change of it."""
OURS = (LOCK, SOFT_LOCK, HOLDER, STAMP)
"""The files that a folder may hold before it has a config.yaml."""


@contextmanager
def open_run(config: Config, run_dir: str | Path, *, device: str = "cpu") -> Iterator[Path]:
    """Lock a run's folder for writing: created for `config`, or resumed if its config.yaml is that of the same run
    (`restart`).

    Raises UserError if another process holds it, if its config differs (naming the first setting that does), if it is
    not the folder of a run, or if it cannot be written.
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
    """Warn once if the file system of a run lacks some of the guarantees of a run."""
    if lost := lacking(path):
        warnings.warn(f"run {path} is on a file system without {'; without '.join(lost)}", stacklevel=2)


def _prepare(path: Path, config: Config, device: str) -> None:
    remove_leftovers(path)
    if (path / CONFIG).exists() and list_checkpoints(path):
        _go_on(path, config, device)
        return
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name not in OURS)
    if strangers and CONFIG not in strangers:
        raise UserError(f"run {path} has no {CONFIG} but holds '{strangers[0]}'; choose another --run")
    # The stamp first: a folder with a config.yaml is complete. A run without a checkpoint has nothing to protect, so
    # its config may be replaced.
    write_text(path / STAMP, json.dumps(stamp(config, device), indent=1))
    write_text(path / CONFIG, dump_config(config))


def _go_on(path: Path, config: Config, device: str) -> None:
    """Apply the settings that may change; the stamp records the old values, and config.yaml the new ones. Another
    precision, where `auto` or TF32 has another meaning on this device, is recorded too, and warned of once."""
    before, stamped = load_config(path / CONFIG), read_stamp(path)
    used, precision = last_precision(stamped, before, device), Precision.of(config, device)
    changes = changes_of(path, before, config, same_dtype=used.dtype == precision.dtype)
    if used != precision:
        changes.append(Change(NUMBERS, asdict(used), asdict(precision)))
    if not changes:
        return
    step, newest = start_of(path, before, config)
    now = [{"when": _now(), "step": step, **asdict(change)} | ({ABANDONED: newest} if step < newest else {})
           for change in changes]
    write_text(path / STAMP, json.dumps(stamped | {CHANGES: [*stamped.get(CHANGES, []), *now]}, indent=1))
    budget = before.training.budget
    if step < newest:
        moved = set_aside(path, step, why=f"budget-{budget}")
        warnings.warn(f"run {path} resumes from step {step}, after which its learning rate began to follow "
                      f"training.budget {budget}; its newest checkpoint is kept as {moved[0]}", stacklevel=2)
    if used != precision:
        warnings.warn(f"run {path} goes on in {precision.name} on {device} and was trained in {used.name} up to step "
                      f"{step}; results differ by rounding from those of a run on one device", stacklevel=2)
    write_text(path / CONFIG, dump_config(config))


def last_precision(stamped: Mapping[str, Any], config: Config, device: str) -> Precision:
    """The precision in which a run was trained last; of a run whose stamp has none, that of its config."""
    found = [change["new"] for change in stamped.get(CHANGES, []) if change["setting"] == NUMBERS]
    if not found and NUMBERS in stamped:
        found = [stamped[NUMBERS]]
    return Precision(**found[-1]) if found else Precision.of(config, device)


def stamp(config: Config, device: str) -> dict[str, Any]:
    """Provenance of a run: code, versions, machine, command."""
    return {
        "created": _now(),
        **_git_state(),
        "versions": versions(),
        "device": device,
        NUMBERS: asdict(Precision.of(config, device)),
        "threads": torch.get_num_threads(),
        "machine": platform.platform(),
        "argv": sys.argv,
        "folder": os.getcwd(),
        "seed": config.seed,
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that affect a run's results; None for a missing package."""
    return {"python": platform.python_version()} | {name: _version(name) for name in (
        "looped", "torch", "accelerate", "safetensors", "tokenizers", "numpy", "xformers")}


def read_stamp(path: str | Path) -> dict[str, Any]:
    """Provenance of a run, as far as recorded."""
    try:
        found = json.loads((Path(path) / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def changed_since_start(path: Path, step: int) -> dict[str, Any]:
    """Setting -> the initial value, for settings that changed since and affect the metrics of the checkpoint of `step`:
    settings of evaluation, and a budget that gave the later steps other weights."""
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
    """Commit and dirty flag of the running source; null if it is not a git checkout."""
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
    """Save the tokenizer with the run, so that generating text needs no corpus. A run without a checkpoint may hold the
    tokenizer of another text, which is replaced. Raises UserError if writing fails."""
    if not (path / TOKENIZER).exists() or not list_checkpoints(path):
        with of_run(path / TOKENIZER):
            write_text(path / TOKENIZER, tokenizer.json())


def own_tokenizer(path: Path) -> TextTokenizer | None:
    """The tokenizer of a trained run on text, which alone may encode its inputs; None otherwise."""
    return load_tokenizer(path / TOKENIZER) if (path / TOKENIZER).exists() and list_checkpoints(path) else None


def started_in(path: str | Path) -> Path:
    """The folder that the relative paths of a run's config start from: the one where training was started, or the
    current folder if none is recorded."""
    return Path(read_stamp(path).get("folder") or ".")


@dataclass
class Run:
    """A trained run: `objective` in evaluation mode (its `.model` is the language model), the `step` of the checkpoint,
    the cost `spent` up to it, and the `identity` of the training data. `other_data`: the run may be evaluated on the
    present data of its config even if they have changed."""

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
        its images (`.images`, `.heldout(batch_size)`); prepared on first access. It can be set, for instance to the
        data that were passed to `train` in Python.

        Text is encoded by the run's own tokenizer; if it is no longer available, its tokens may be in the cache.
        Raises UserError if the config leads to other data than the run was trained on, unless `other_data`.
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
        """The name of the evaluation data if they are not those of training; None otherwise."""
        own = self._given is None and not self.other_data
        return None if own or self.identity.matches(self.data) else label_of(self.data)

    @property
    def scale(self) -> Normalizer:
        """The normalisation of the training images, which are read only if it is not recorded."""
        return self.identity.scale or self.data.images.scale

    @property
    def class_names(self) -> Sequence[str]:
        """The class names of the training images."""
        return self.identity.facts.get("classes") or self.data.images.class_names

    @cached_property
    def tokenizer(self) -> TextTokenizer | TokenNumbers:
        """The run's own copy of its tokenizer, which needs no text; numbers if its custom data have none."""
        custom = self.identity.given or self.config.domain.name is not None
        if custom and not (self.path / TOKENIZER).exists():
            return TokenNumbers()
        return load_tokenizer(self.path / TOKENIZER)


def load_run(path: str | Path, *, ema: bool = True, step: int | None = None, device: str | torch.device = "cpu",
             settings: Mapping[str, Any] | None = None, data: Data | HeldoutText | None = None,
             other_data: bool = False) -> Run:
    """Load a run from its newest intact checkpoint, or from that of `step`; with EMA weights, if it has any and `ema`.

    settings: changes to the run's config, limited to `FREE_AFTER_TRAINING`. data: the data to evaluate the run on,
    instead of those of its config. other_data: the config may lead to other data than in training. Raises UserError if
    there is no run or no intact checkpoint, if the weights do not fit the config, or if a setting is fixed by training.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is not a run: it has no {CONFIG}; pass the folder that `looped train` wrote")
    config = _changed(path, settings or {})
    checkpoint, state = _choose_checkpoint(path, step)
    name = "ema" if ema and part_of(checkpoint, "ema").exists() else "model"
    tensors = load_tensors(checkpoint, name)
    identity = recall_data(path, state)
    model = build(config, identity.vocab_size, identity.picture)
    objective = build_objective(config, model, _end_of_text(path, state))
    load_module(objective, tensors, part_of(checkpoint, name))
    run = Run(path, config, state["step"], objective.to(device).eval(), identity, Counters.of(state), other_data)
    if data is not None:
        if not hasattr(data, "heldout"):
            raise UserError(f"data must be opened data with a held-out part, got {kind_of(data)}; of texts make "
                            f"looped.heldout_text(texts, run.tokenizer)")
        run.data = data
    return run


def identity_of(path: str | Path) -> Identity:
    """Identity of the training data of a run's newest intact checkpoint. Raises UserError if there is none."""
    return recall_data(Path(path), _choose_checkpoint(Path(path), None)[1])


def _end_of_text(path: Path, state: Mapping[str, Any]) -> int | None:
    """The token that ends a document of text; older runs have it only in their tokenizer."""
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
