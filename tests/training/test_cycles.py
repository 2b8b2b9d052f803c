"""A training step leaves no tensor in a reference cycle, where its memory would wait for Python's collector.

The command line lets the collector look rarely (`looped.cli`).
"""

import gc

import pytest
import torch

from looped.training.callbacks import Callback
from looped.training.train import open_trainer

BLOCKS = {"blocks.num": 2, "model.num_core_layers": 2}
RULES = {
    "ar": {}, "full": {}, "truncated": {}, "one-step": {}, "progressive": {}, "fixed-point": {}, "denoise": {},
    "masked": {"evaluation.levels": 2}, "blockwise": BLOCKS,
    "recomputed": {"objective": "full", "training.checkpoint_activations": True},
}


TENSORS = (torch.Tensor, torch.nn.Parameter)


class InCycle(Callback):
    """Leaves a tensor behind in a cycle."""

    def on_step(self, trainer):
        cycle = [torch.zeros(1)]
        cycle.append(cycle)


def left_in_cycles(config, run, *callbacks):
    """The number of tensors that three steps leave to the collector; what only a first step leaves is not counted, nor
    is what torch.compile leaves behind of other tests: tensors without memory, and tensors from before."""
    debug = gc.get_debug()
    with open_trainer(config, run, evaluate=lambda *_: {}, quiet=True, callbacks=callbacks) as trainer:
        trainer.step()
        gc.collect()
        before = [thing for thing in gc.get_objects() if type(thing) in TENSORS]
        gc.disable()
        try:
            gc.set_debug(gc.DEBUG_SAVEALL)
            for _ in range(3):
                trainer.step()
            gc.collect()
            return len({id(thing) for thing in gc.garbage if type(thing) in TENSORS} - set(map(id, before)))
        finally:
            gc.set_debug(debug)
            gc.garbage.clear()
            gc.enable()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rule", RULES)
def test_a_step_leaves_no_tensor_to_the_collector(rule, tiny, tmp_path):
    config = tiny(**{"objective": rule, "training.checkpoint_every": 100, "training.log_every": 1} | RULES[rule])
    assert left_in_cycles(config, tmp_path / "run") == 0


@pytest.mark.usefixtures("unchecked")
def test_a_tensor_in_a_cycle_is_found(tiny, tmp_path):
    """The positive control."""
    config = tiny(objective="ar", **{"training.checkpoint_every": 100})
    assert left_in_cycles(config, tmp_path / "run", InCycle()) == 3
