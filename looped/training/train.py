"""Training in a run folder: `train` to the end of the budget, or step by step with `open_trainer`.

    with open_trainer(config, "runs/mine", callbacks=[EarlyStopping("next_token", patience=3)]) as trainer:
        while not trainer.finished:
            trainer.step()
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from looped.config import Config
from looped.data.from_config import Data, Seen, find_data, located
from looped.errors import UserError
from looped.nn.checks import kind_of, require
from looped.notices import noted, silent
from looped.objectives import Objective
from looped.precision import Precision
from looped.training.block_edges import with_measured_edges
from looped.training.callbacks import Callback
from looped.training.data_identity import remember_data
from looped.training.determinism import deterministic
from looped.training.heldout import heldout_figures, heldout_samples
from looped.training.logs import LOG, Monitor, append
from looped.training.processes import check_attention, processes_of, several
from looped.training.run_messages import say_goodbye, say_hello
from looped.training.runs import open_run, own_tokenizer, save_tokenizer, started_in
from looped.training.signals import catch_signals
from looped.training.trainer import Evaluate, Sample, Trainer
from looped.training.warm_start import check_source


@dataclass(frozen=True)
class Result:
    """Result of training: `step` optimiser steps are done and saved; `signal` is the one that stopped it, 0 if none."""

    run_dir: Path
    step: int
    objective: Objective
    signal: int = 0

    @property
    def exit_code(self) -> int:
        """0, or by shell convention 128 + the signal: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signal if self.signal else 0


def train(config: Config, run_dir: str | Path, *, evaluate: Evaluate | None = None, sample: Sample | None = None,
          data: Data | None = None, callbacks: Sequence[Callback] = (), quiet: bool = False) -> Result:
    """Train `config` in the folder `run_dir`, or resume from its newest intact checkpoint: `open_trainer` with the same
    arguments, then `Trainer.step` until the budget is used or a callback or signal ends training."""
    with open_trainer(config, run_dir, evaluate=evaluate, sample=sample, data=data, callbacks=callbacks,
                      quiet=quiet) as trainer:
        while not trainer.finished:
            trainer.step()
    return Result(trainer.run_dir, trainer.done.step, trainer.unwrap(), trainer.signal)


@contextmanager
def open_trainer(config: Config, run_dir: str | Path, *, evaluate: Evaluate | None = None,
                 sample: Sample | None = None, data: Data | None = None, callbacks: Sequence[Callback] = (),
                 quiet: bool = False) -> Iterator[Trainer]:
    """Lock the run in the folder `run_dir` and yield its trainer, at the newest intact checkpoint; at the end of the
    block the last step is saved.

    evaluate: (objective, data, config) -> metrics to log every `training.eval_every` steps, `training.num_evals` times
    over the budget, and at the end; None: the losses on held-out text, the fraction of solved problems of a task, the
    accuracy on images, or the loss of generating them. sample: (objective, data, config) -> text to print, or a picture
    to save in samples/, every `training.sample_every` steps; None: continuations of held-out text at
    `evaluation.sample_depths`, a problem with its answer, predicted classes, or images. Both use EMA weights if there
    are any. data: None opens the data of the config. callbacks: called after steps, log lines and evaluations; they may
    end training. quiet: lines go only to train.log.

    SIGTERM or Ctrl-C finishes the step, saves and ends, and a second Ctrl-C ends at once; before there is a trainer,
    either ends at once, by SystemExit or KeyboardInterrupt. SIGUSR1 and SIGUSR2 save after the step.

    Raises UserError for no config, a run in use, a config that does not fit, processes that differ, damaged
    checkpoints, a full disk, a loss that is not finite, or under `training.deterministic` an operation without a
    deterministic kernel; and LostProcess if one of several processes is gone.
    """
    require(config, Config, "config", "load one with looped.load_config(path)")
    pilot, config = config.blocks.edges_from, with_measured_edges(config)
    with ExitStack() as stack:
        stack.enter_context(deterministic(config.training.deterministic))  # before CUDA starts
        run_dir, given = Path(run_dir), data is not None
        if given:
            _check_data(data)
        if several() and not given:  # before the group of processes, in which none may wait for long
            with silent():
                _open_data(config, run_dir)
        caught = stack.enter_context(catch_signals(heeded=False))
        processes = stack.enter_context(processes_of(config))
        device = processes.accelerator.device
        check_attention(config, processes.accelerator)
        stack.enter_context(Precision.of(config, device).products(device))
        run = open_run(config, run_dir, device=str(device))
        processes.first(lambda: stack.enter_context(run))
        if processes.is_first:
            stack.enter_context(noted(lambda line: append(run_dir / LOG, line + "\n")))
        if data is None:
            with nullcontext() if processes.is_first else silent():
                data = processes.every(lambda: _open_data(config, run_dir))
        processes.check_same({"fingerprint of the data": data.fingerprint}, "give every process the same data; without "
                             "data.path they are the text of Python's standard library, of one release of Python")
        if pilot is not None and not config.training.other_data:
            processes.every(lambda: check_source("blocks.edges_from", pilot, data))
        monitor = stack.enter_context(Monitor(run_dir, config, main=processes.is_first, quiet=quiet))
        trainer = Trainer(config, run_dir, data, processes, monitor)
        stack.callback(trainer.ahead.close)
        stack.callback(trainer.saver.close)
        trainer.attend(partial(heldout_figures, workers=processes.workers) if evaluate is None
                       else processes.by_first(evaluate),
                       partial(heldout_samples, workers=processes.workers) if sample is None
                       else processes.by_first(sample), callbacks, caught)
        caught.heeded = True
        if data.tokenizer is not None:
            processes.first(lambda: save_tokenizer(run_dir, data.tokenizer))
        processes.first(lambda: remember_data(run_dir, data, given=given))
        say_hello(trainer)
        trainer.catch_up()
        yield trainer
        trainer.save()
        trainer.saver.wait()
        say_goodbye(trainer)


MEMBERS = ("train", "heldout", "vocab_size", "tokenizer", "picture", "end_of_text", "fingerprint", "facts", "summary")
"""The members of opened data, those of custom domains too."""


def _check_data(data: object) -> None:
    """Raises UserError for data that lack a member."""
    missing = [name for name in MEMBERS if not hasattr(data, name)]
    if missing:
        raise UserError(f"data is {kind_of(data)} without {', '.join(missing)}; give opened data, as under "
                        f"\"Data of your own\" in docs/trainer.md")


def _open_data(config: Config, run_dir: Path) -> Data:
    return find_data(located(config, started_in(run_dir))).open(Seen(own_tokenizer(run_dir)))
