"""Resume a sharded run in the processes of a launcher: RUN STEPS [LIMIT], where LIMIT is the size in bytes of the
largest file that the second process can write. Prints the sentence of a UserError."""

import resource
import signal
import sys
from pathlib import Path

import torch

from looped.config import load_config
from looped.errors import UserError
from looped.training.train import open_trainer


def main(run, steps, limit=None):
    torch.set_num_threads(1)
    config = load_config(run.parent / f"{run.name}.yaml")
    try:
        with open_trainer(config, run, quiet=True) as trainer:
            if limit is not None and trainer.accelerator.process_index == 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            for _ in range(steps):
                trainer.step()
    except UserError as error:
        print(f"said: {error}", flush=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
