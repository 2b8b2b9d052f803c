"""Train each config of a JSON file in the processes of a launcher, stopping once on the way, and count exchanges.

Writes RUN-whole (undisturbed), RUN-again (stopped after half of the steps, then resumed), counts.json, for every config
the all-gathers of each step and their bytes, and kept.json, the bytes of its weights, moments and averages.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from looped.config import load_config
from looped.training.train import open_trainer, train

calls = []
plain = dist.all_gather_single


def counted(output, *args, **kwargs):
    calls.append(output.numel() * output.element_size())
    return plain(output, *args, **kwargs)


def size(tensor):
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def main(folder):
    dist.all_gather_single = counted  # of FSDP2 alone
    torch.set_num_threads(1)
    counts, kept = {}, {}
    for name, (settings, stops) in json.loads((folder / "configs.json").read_text()).items():
        config = load_config(None, settings)
        steps = []
        with open_trainer(config, folder / f"{name}-whole", quiet=True) as trainer:
            while not trainer.finished:
                calls.clear()
                trainer.train_step()
                steps.append([len(calls), sum(calls)])
                trainer.ended = trainer.agree(0)[0]
            trainer.log()
            kept[name] = [sum(map(size, trainer.objective.parameters())),
                          sum(size(slot) for optimizer in trainer.optimizers for state in optimizer.state.values()
                              for slot in state.values() if slot.ndim),
                          sum(map(size, trainer.ema.averages)) if trainer.ema else 0]
        counts[name] = steps
        if stops:
            with open_trainer(config, folder / f"{name}-again", quiet=True) as trainer:
                for _ in range(config.training.budget // 2):
                    trainer.step()
            train(config, folder / f"{name}-again", quiet=True)
    if dist.get_rank() == 0:
        (folder / "counts.json").write_text(json.dumps(counts))
        (folder / "kept.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
