"""The first and the last lines that a run prints."""

import signal
from typing import Any

from looped.objectives.degenerate_loops import cautions
from looped.precision import Precision
from looped.training.processes import first_backend


def say_hello(trainer: Any) -> None:
    """Print the data, the model, the device and precision of a `Trainer`, the step to resume from, and warnings."""
    device, step = trainer.accelerator.device, trainer.done.step
    num, processes = sum(p.numel() for p in trainer.objective.parameters()), trainer.accelerator.num_processes
    trainer.monitor.say(trainer.data.summary)
    trainer.monitor.say(f"{trainer.config.objective}: {num:,} parameters, {processes} process{'es' * (processes > 1)} "
                        f"on {device}, {Precision.of(trainer.config, device).name}"
                        + ", deterministic" * trainer.config.training.deterministic
                        + (f"; resuming from step {step}" if step else ""))
    first_backend(trainer.config, trainer.accelerator)
    for caution in cautions(trainer.config):
        trainer.monitor.say(f"warning: {caution}")


def say_goodbye(trainer: Any) -> None:
    """Print how the run of a `Trainer` has ended, and how to resume it."""
    done = trainer.done
    if trainer.fraction < 1:
        why = signal.Signals(trainer.signal).name if trainer.signal else "ended early"
        trainer.monitor.say(f"{why}: stopped after step {done.step}, which is saved; run the same command again to "
                            f"resume")
    else:
        trainer.monitor.say(f"done: {done.step} steps, {done.tokens:,} tokens, {done.seconds:.1f} s of training; the "
                            f"run is {trainer.run_dir}")
