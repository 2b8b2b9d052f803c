"""Evaluate trained runs once more in the processes of a launcher, each with its part of the batches.

Appends the figures to the metrics.jsonl of each run of runs.json, name -> settings, and writes sample-RUN.json, the
sample that training would show, and measured-RANK.json: for every run the batches that the process has measured, and
for the run `own` how often it called a user's function.
"""

import json
import sys
from pathlib import Path

import torch

from looped.config import load_config
from looped.evaluation.workers import SeveralWorkers
from looped.training.heldout import heldout_figures
from looped.training.train import open_trainer

plain = SeveralWorkers.over
measured = []


def counted(self, batches, measure):
    return plain(self, batches, lambda batch: measured.append(1) or measure(batch))


def own(objective, data, config):
    measured.append(1)
    return heldout_figures(objective, data, config)


def write_sample(trainer, path):
    made = trainer.on_eval(trainer.samples)
    if trainer.processes.is_first:
        path.write_text(json.dumps(made if isinstance(made, str) else made.tolist()), encoding="utf-8")


def main(folder):
    torch.set_num_threads(1)
    SeveralWorkers.over = counted
    counts = {}
    for name, settings in json.loads((folder / "runs.json").read_text(encoding="utf-8")).items():
        evaluate = own if name == "own" else None
        with open_trainer(load_config(None, settings), folder / name, evaluate=evaluate, quiet=True) as trainer:
            measured.clear()
            trainer.evaluate()
            rank, num = trainer.accelerator.process_index, len(measured)
            if name != "one block":  # which cannot run alone
                write_sample(trainer, folder / f"sample-{name}.json")
        counts[name] = num
    (folder / f"measured-{rank}.json").write_text(json.dumps(counts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
