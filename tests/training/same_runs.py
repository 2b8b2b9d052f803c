"""Two runs compared: the figures of metrics.jsonl but for its timing, and every saved tensor, bit for bit."""

import json

import torch

from looped.training import checkpoint as ckpt
from looped.training.logs import TIMING


def weights(run):
    """Whole tensors of the newest checkpoint: of the model, its averages, and the optimisers."""
    newest = ckpt.list_checkpoints(run)[0]
    found = {part: ckpt.load_tensors(newest, part) for part in ("model", "ema", "optimizer")
             if ckpt.part_of(newest, part).exists()}
    assert "model" in found
    return found


def figures(run):
    """Lines of metrics.jsonl without the fields that differ between two runs of one command."""
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING}
            for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same(run, other):
    """Equal figures, and equal tensors in the newest checkpoint."""
    assert figures(run) == figures(other)
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensors in ours.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, theirs[name][key]), (name, key)
