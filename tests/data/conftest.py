"""Small documents, and a config that keeps its cache in the test's own folder."""

import pytest

from looped.config.data import DataConfig


@pytest.fixture
def texts(tmp_path):
    """A folder of forty text files of a few hundred bytes each, some of them not in ASCII."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        lines = [f"File {number}, line {line}: the naïve fox {'jumps' if line % 3 else 'läuft 🙂'} over {line}.\n"
                 for line in range(12)]
        (folder / f"{number:02}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def make(tmp_path, texts):
    """A DataConfig over `texts` with a small vocabulary; keywords change it."""
    def config(**settings) -> DataConfig:
        return DataConfig(**{"path": str(texts), "vocab_size": 300, "length": 16, "heldout": 0.2,
                             "cache_dir": str(tmp_path / "cache"), **settings})
    return config
