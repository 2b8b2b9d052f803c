"""A tiny run for the training tests: real model, real text, a fraction of a second a dozen steps."""

import pytest
import torch

from looped.config import load_config

TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * i % 17}  # number {i} of many\n\n" for i in range(400))

TINY = {
    "model.width": 16, "model.num_heads": 2, "model.num_prelude_layers": 1, "model.num_core_layers": 1,
    "model.num_coda_layers": 1, "recurrence.mean": 3, "recurrence.backprop": 2, "denoise.cond_width": 8,
    "denoise.target.dim": 4, "data.vocab_size": 270, "data.length": 8, "optim.warmup_steps": 3,
    "training.batch_size": 4, "training.budget": 8, "training.threads": 1, "training.log_every": 3,
    "training.checkpoint_every": 2, "evaluation.num_sequences": 4, "evaluation.prompt_length": 4,
}


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for part in range(8):
        (folder / f"{part}.txt").write_text(TEXT[part * len(TEXT) // 8 : (part + 1) * len(TEXT) // 8])
    return folder


@pytest.fixture(scope="session")
def tiny(text_folder):
    """A config of 8 steps with anything changed: `tiny(objective="truncated", **{"optim.name": "muon"})`."""
    def make(**changes):
        data = {"data.path": [str(text_folder)], "data.cache_dir": str(text_folder.parent / "tokens")}
        return load_config(None, TINY | data | changes)

    return make


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
