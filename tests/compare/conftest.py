"""A comparison small enough to be trained in a test, and run figures made up for those that need none."""

from pathlib import Path

import pytest
import torch
import yaml

from looped.cli import main
from looped.compare.plan import RunSpec
from looped.compare.text_measure import TextMeasured
from looped.config import load_config
from looped.config.arms import Arm

TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * i % 17}  # <b>number</b> {i} & more\n\n" for i in range(400))
TINY = {
    "model": {"width": 16, "num_heads": 2, "num_core_layers": 1}, "recurrence": {"mean": 2, "backprop": 1},
    "denoise": {"cond_width": 8, "target": {"dim": 4}},
    "training": {"budget": 8, "batch_size": 4, "threads": 1, "log_every": 3, "checkpoint_every": 2, "num_evals": 4},
    "evaluation": {"num_sequences": 4, "num_samples": 3, "sample_length": 6, "prompt_length": 4},
}


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory):
    """A config of eight steps on a text of its own."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text").mkdir()
    for part in range(8):
        (folder / "text" / f"{part}.txt").write_text(TEXT[part * len(TEXT) // 8 : (part + 1) * len(TEXT) // 8])
    data = {"path": str(folder / "text"), "cache_dir": str(folder / "tokens"), "vocab_size": 300, "length": 16,
            "heldout": 0.2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"data": data}))
    return folder / "tiny.yaml"


@pytest.fixture(scope="session")
def command(tiny_yaml):
    """Two arms, two seeds, eight steps each; but for where they go."""
    return ["compare", str(tiny_yaml), "--objectives", "ar,denoise", "--budget", "tokens", "--amount", "500", "--seeds",
            "2"]


@pytest.fixture(scope="session")
def changed():
    """`changed(command, flags)`: the command with these flags, in the place of its own of the same names."""
    def make(command, flags):
        kept = list(command)
        for name in flags[::2]:
            if name in kept:
                place = kept.index(name)
                del kept[place : place + 2]
        return [*kept, *flags]

    return make


@pytest.fixture(scope="session")
def done(command, tiny_yaml, in_place):
    """A finished comparison."""
    out = tiny_yaml.parent / "done"
    with in_place():
        assert main([*command, "--out", str(out), "--jobs", "2"]) == 0
    return out


@pytest.fixture(scope="session")
def made_up():
    """`made_up("denoise", 0, losses, curve)`: a measured run with these next-token losses and this curve of them."""
    def make(objective, seed, losses, curve=((1, 5.0), (2, 4.0)), *, seconds_a_step=1.0):
        place = RunSpec(Arm(objective, objective, load_config(None, {"objective": objective}), objective), seed,
                      Path(f"{objective}-{seed}"))
        losses = torch.tensor(losses, dtype=torch.float64)
        metric = {"nats_at_sigma_max": {1: losses}} if objective == "denoise" else {}
        depths = {1: losses, place.config.main_depth: losses}
        lines = [{"kind": "heldout", "step": step, "next_token": loss, "seconds": step * seconds_a_step,
                  "tokens": 10 * step, "layer_forwards": 100.0 * step} for step, loss in curve]
        costs = {name: lines[-1].get(name, 0) for name in ("step", "tokens", "layer_forwards", "seconds", "peak_bytes")}
        return TextMeasured(place, [], costs, lines, {"nats_per_token": depths, **metric}, [])

    return make
