"""Notices beside results: one line on the terminal, the same line in the run's log."""

import subprocess
import sys
import warnings

import pytest
import yaml

from looped.config import load_config
from looped.notices import noted, notice_line, plain_notices
from looped.training.train import train


@pytest.fixture
def cut_short(tmp_path):
    """A config of one step on text that is cut off, in a folder where a file is passed over."""
    (tmp_path / "text").mkdir()
    for part in range(4):
        (tmp_path / "text" / f"{part}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (tmp_path / "text" / "picture.png").write_bytes(b"")
    config = {
        "objective": "ar", "model": {"width": 16, "num_heads": 2, "num_core_layers": 1},
        "data": {"path": str(tmp_path / "text"), "cache_dir": str(tmp_path / "tokens"), "vocab_size": 270, "length": 8,
                 "heldout": 0.3, "max_bytes": 4000},
        "training": {"budget": 1, "batch_size": 1, "threads": 1},
        "evaluation": {"num_sequences": 1, "sample_length": 2, "prompt_length": 2, "depths": [1]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "config.yaml"


def test_a_warning_is_one_line_on_the_terminal_and_in_the_log(cut_short, tmp_path):
    command = [sys.executable, "-m", "looped.cli", "train", str(cut_short), "--run", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    passed, cut = done.stderr.splitlines()
    assert passed.startswith(f"notice: data.path {tmp_path / 'text'}: skipped 1 .png; ")
    assert cut.startswith("notice: data.max_bytes 4,000 cuts the text off in 2.txt, its document 3 in reading order; ")
    assert done.stderr.splitlines() == (tmp_path / "run" / "train.log").read_text().splitlines()[:2]


def test_a_library_sees_the_same_warnings_and_the_log_has_them(cut_short, tmp_path):
    with pytest.warns(UserWarning, match="cuts the text off") as caught:
        train(load_config(cut_short), tmp_path / "run")
    said = [notice_line(each.message, each.category) for each in caught]
    assert said == (tmp_path / "run" / "train.log").read_text().splitlines()[: len(said)]
    assert warnings.formatwarning("text", UserWarning, "file.py", 3).startswith("file.py:3: ")  # as it was


def test_a_message_of_several_lines_is_one_line_and_another_kind_is_named():
    assert notice_line("one\n  two", UserWarning) == "notice: one two"
    assert notice_line("old", FutureWarning) == "FutureWarning: old"
    with plain_notices():
        assert warnings.formatwarning("one\ntwo", UserWarning, "file.py", 3) == "notice: one two\n"


def test_warnings_that_are_switched_off_are_not_noted():
    lines = []
    with warnings.catch_warnings(), noted(lines.append):
        warnings.simplefilter("ignore")
        warnings.warn("off", stacklevel=1)
        warnings.simplefilter("always")
        with warnings.catch_warnings(record=True):
            warnings.warn("kept by someone else", stacklevel=1)
    assert lines == []
