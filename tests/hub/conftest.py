"""Fixtures of tiny models in folders; no test here asks the hub."""

import pytest
from tiny_models import gpt2, llama, save


@pytest.fixture(scope="session", autouse=True)
def _offline():
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of a GPT-2 and a Llama; that of the Llama has a tokenizer that leaves spaces out of its offsets."""
    root = tmp_path_factory.mktemp("models")
    return {"gpt2": save(root / "gpt2", gpt2()), "llama": save(root / "llama", llama(), trim=True)}
