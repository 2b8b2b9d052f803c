"""Train each config of a JSON file in the processes of a launcher, stopping once on the way, and count exchanges.

Writes RUN-whole (undisturbed), RUN-again (stopped after half of the steps, then resumed), and counts.json, for every
config the all-gathers of each step and their bytes.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from looped.config import load_config
from looped.training.train import open_trainer, train

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from scale_table import Exchange


def main(folder):
    torch.set_num_threads(1)
    counts = {}
    for name, (settings, stops) in json.loads((folder / "configs.json").read_text()).items():
        config = load_config(None, settings)
        steps = []
        with Exchange("all_gather_single") as gathers, \
                open_trainer(config, folder / f"{name}-whole", quiet=True) as trainer:
            while not trainer.finished:
                gathers.taken()
                trainer.train_step()
                steps.append(gathers.taken())
                trainer.ended = trainer.agree(0)[0]
            trainer.log()
        counts[name] = steps
        if stops:
            with open_trainer(config, folder / f"{name}-again", quiet=True) as trainer:
                for _ in range(config.training.budget // 2):
                    trainer.step()
            train(config, folder / f"{name}-again", quiet=True)
    if dist.get_rank() == 0:
        (folder / "counts.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
