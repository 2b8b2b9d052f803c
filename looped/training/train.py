"""Training in a run folder: `train` to the end of the budget, or step by step by `open_trainer`.

    with open_trainer(config, "runs/mine", callbacks=[EarlyStopping("next_token", patience=3)]) as trainer:
        while not trainer.finished:
            trainer.step()
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from looped.config import Config
from looped.data.opening import Data, Seen, find_data, located
from looped.nn.checks import require
from looped.notices import noted
from looped.objectives import Objective
from looped.training.callbacks import Callback
from looped.training.edges import with_measured_edges
from looped.training.heldout import heldout_figures, heldout_samples
from looped.training.identity import remember_data
from looped.training.monitor import LOG, Monitor, append
from looped.training.processes import catch_signals, every_process, first_process, start_accelerator
from looped.training.runs import open_run, own_tokenizer, save_tokenizer, started_in
from looped.training.trainer import Evaluate, Sample, Trainer
from looped.training.warm_start import check_source


@dataclass(frozen=True)
class Result:
    """The end of training: `step` optimiser steps are done and saved; `signal` is what stopped it early, if any did."""

    run_dir: Path
    step: int
    objective: Objective
    signal: int = 0

    @property
    def exit_code(self) -> int:
        """0, or by shell custom 128 + the signal: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signal if self.signal else 0


def train(config: Config, run_dir: str | Path, *, evaluate: Evaluate | None = None, sample: Sample | None = None,
          data: Data | None = None, callbacks: Sequence[Callback] = (), quiet: bool = False) -> Result:
    """Train `config` in the folder `run_dir`, or go on where its newest whole checkpoint stands: `open_trainer`, whose
    arguments these are, and `Trainer.step` until the budget is used, a callback ends it, or a signal does."""
    with open_trainer(config, run_dir, evaluate=evaluate, sample=sample, data=data, callbacks=callbacks,
                      quiet=quiet) as trainer:
        while not trainer.finished:
            trainer.step()
    return Result(trainer.run_dir, trainer.done.step, trainer.unwrap(), trainer.signal)


@contextmanager
def open_trainer(config: Config, run_dir: str | Path, *, evaluate: Evaluate | None = None,
                 sample: Sample | None = None, data: Data | None = None, callbacks: Sequence[Callback] = (),
                 quiet: bool = False) -> Iterator[Trainer]:
    """Hold the run in the folder `run_dir` and give its trainer, at the newest whole checkpoint; at the end of the
    block what is done is saved.

    evaluate: (objective, data, config) -> figures to log every `training.eval_every` steps, `training.num_evals` times
    over the budget, and at the end; when None the losses on held-out text, how many problems of a task are solved, or
    the accuracy on images or the loss of making them. sample: likewise -> text to print, or a picture to keep in
    samples/, every `training.sample_every` steps; when None continuations of held-out text at
    `evaluation.sample_depths`, a problem with its answer, classes with their names, or images. Both see averaged
    weights where there are some. data: None prepares what the config names. callbacks: told of steps, lines of the log
    and evaluations; they may end training. quiet: lines go to train.log alone.

    The first SIGTERM or Ctrl-C finishes the step, saves and ends; a second one stops at once. Raises UserError for no
    config, a run in use, a config that does not fit, damaged checkpoints, a full disk, or a loss that is not finite.
    """
    require(config, Config, "config", "load one with looped.load_config(path)")
    pilot, config = config.blocks.edges_from, with_measured_edges(config)
    accelerator = start_accelerator(config)
    with ExitStack() as stack:
        run_dir = Path(run_dir)
        run = open_run(config, run_dir, device=str(accelerator.device))
        first_process(accelerator, lambda: stack.enter_context(run))
        if accelerator.is_main_process:
            stack.enter_context(noted(lambda line: append(run_dir / LOG, line + "\n")))
        given = data is not None
        if data is None:
            data = every_process(accelerator, lambda: find_data(located(config, started_in(run_dir))).open(
                Seen(own_tokenizer(run_dir))))
        if pilot is not None and not config.training.other_data:
            every_process(accelerator, lambda: check_source("blocks.edges_from", pilot, data))
        monitor = stack.enter_context(Monitor(run_dir, config, main=accelerator.is_main_process, quiet=quiet))
        caught = stack.enter_context(catch_signals())
        trainer = Trainer(config, run_dir, data, accelerator, monitor)
        trainer.attend(evaluate or heldout_figures, sample or heldout_samples, callbacks, caught)
        if data.tokenizer is not None:
            first_process(accelerator, lambda: save_tokenizer(run_dir, data.tokenizer))
        first_process(accelerator, lambda: remember_data(run_dir, data, given=given))
        trainer.say_hello()
        yield trainer
        trainer.save()
        trainer.say_goodbye()
