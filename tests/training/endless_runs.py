"""Train a config of a stream in the processes of a launcher: 20 steps at once, and 10, resumed, and 10.

Writes RUN-whole and RUN-again, and for each of them and each rank the batches of all steps, RUN-whole-0.pt.
"""

import sys
from pathlib import Path

import torch
from accelerate.state import PartialState

from looped.config import load_config
from looped.training.train import open_trainer


def train(config, run, stop):
    """The batches that are trained on until step `stop`."""
    batches = []
    with open_trainer(config, run, quiet=True) as trainer:
        draw = trainer.ahead.get

        def kept(step, micro):
            batch, draws = draw(step, micro)
            batches.append(batch)
            return batch, draws

        trainer.ahead.get = kept
        while not trainer.finished and trainer.done.step < stop:
            trainer.step()
    return batches


def main(folder):
    torch.set_num_threads(1)
    config = load_config(folder / "config.yaml")
    whole = train(config, folder / "whole", 20)
    again = train(config, folder / "again", 10) + train(config, folder / "again", 20)
    rank = PartialState().process_index
    torch.save(whole, folder / f"whole-{rank}.pt")
    torch.save(again, folder / f"again-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
