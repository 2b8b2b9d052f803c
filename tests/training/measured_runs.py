"""Train each config of a JSON file for two steps in the processes of a launcher, and measure what `looped plan` counts.

Writes measured.json, for every config the bytes and FLOPs of `measure`.
"""

import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from looped.config import load_config
from looped.cost.traced_flops import flops_of
from looped.training.checkpoint import list_checkpoints
from looped.training.train import open_trainer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from scale_table import Exchange

NUM_STEPS = 2


def local(tensors: Iterable) -> int:
    """Bytes of the tensors' parts in this process."""
    return sum((each.to_local() if hasattr(each, "to_local") else each).nbytes for each in tensors)


class ToOwners(Exchange):
    """Muon's exchanges, of which all that a process sends is counted."""

    def __init__(self):
        super().__init__("all_to_all_single")

    def __call__(self, received, sent, *args, **kwargs):
        self.sizes.append(sent.nbytes)
        return self.plain(received, sent, *args, **kwargs)


def measure(config, run):
    """{"weights", "gradients", "optimiser", "averages", "activations" (of a micro-batch), "sent"}: bytes of this
    process; "summed": bytes of the buffers in which DDP adds up; "gathered": bytes of whole weights after a gather;
    "flops": of a step in all processes; "checkpoint": bytes on the disk."""
    kept, flops, found, summed = [], [], {}, []
    with ExitStack() as stack:
        exchanges = [stack.enter_context(Exchange(name)) for name in ("all_gather_single", "reduce_scatter_single")]
        owners = stack.enter_context(ToOwners())
        trainer = stack.enter_context(open_trainer(config, run, quiet=True))
        num, plain, clip = trainer.accelerator.num_processes, trainer.run, trainer.clip

        def forward(batch, draws):
            own = {p.untyped_storage().data_ptr() for p in (*trainer.objective.parameters(),
                                                            *trainer.objective.buffers())}
            saved = {}

            def pack(tensor):
                saved[tensor.untyped_storage().data_ptr()] = tensor  # kept: no other gets the address meanwhile
                return tensor

            with saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = plain(batch, draws)
            kept.append(sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own))
            return loss

        def clipped():
            found["gradients"] = local(p.grad for p in trainer.objective.parameters() if p.grad is not None)
            return clip()

        def add_up(_, bucket):
            summed.append(bucket.buffer().nbytes)
            return allreduce_hook(None, bucket)

        if hasattr(trainer.layout.module, "register_comm_hook"):
            trainer.layout.module.register_comm_hook(None, add_up)
        for _ in range(NUM_STEPS):
            with patch.object(trainer, "run", forward), patch.object(trainer, "clip", clipped):
                flops.append(flops_of(trainer.train_step))
        optimiser = local(slot for optimizer in trainer.optimizers for state in optimizer.state.values()
                          for slot in state.values())
        gathered, scattered = (exchange.taken()[1] / NUM_STEPS for exchange in exchanges)
        to_owners = sum(trainer.processes.gather([owners.taken()[1] / NUM_STEPS])) / num
        found |= {"weights": local(trainer.objective.parameters()), "optimiser": optimiser,
                  "averages": local(trainer.ema.averages) if trainer.ema else 0, "summed": sum(summed) / NUM_STEPS,
                  "gathered": gathered, "sent": (num - 1) / num * (
                      gathered + scattered + to_owners + 2 * sum(summed) / NUM_STEPS),
                  "activations": sum(kept) / len(kept),
                  "flops": sum(trainer.processes.gather([sum(flops) / NUM_STEPS]))}
    return found | {"checkpoint": sum(path.stat().st_size for path in list_checkpoints(run)[0].rglob("*"))}


def main(folder):
    torch.set_num_threads(1)
    found = {name: measure(load_config(None, settings), folder / name)
             for name, settings in json.loads((folder / "configs.json").read_text(encoding="utf-8")).items()}
    if dist.get_rank() == 0:
        (folder / "measured.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
