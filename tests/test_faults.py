"""Random broken configs, data files and checkpoints: one sentence, exit code 2, no traceback, nothing lost.

The suite draws a few dozen of each; `pytest -m slow tests/test_faults.py` draws a thousand.
"""

import contextlib
import hashlib
import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from looped.cli import main
from looped.config import Config, load_config
from looped.errors import UserError

FEW, MANY = 25, 340
"""Examples of each of the three kinds of fault: in the suite, and in the thousand."""

numbers = itertools.count()


def examples(number):
    return settings(max_examples=number, deadline=None, database=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))


def complaint(*arguments) -> str:
    """The sentence a command ends with, with code 2; before it only notes of damaged checkpoints are allowed."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(word) for word in arguments])
    text = said.getvalue()
    assert code == 2, f"exit code {code}: {text}"
    *notes, sentence, end = text.split("\n")
    assert sentence.startswith("looped: "), text
    assert end == "", text
    assert all("is damaged" in note for note in notes), text
    return sentence


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder and its hash, but for the lock and the log, which grows."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", "train.log")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def base(place) -> dict:
    """A config that works, on text of its own."""
    folder = place / "text"
    folder.mkdir()
    for part in range(6):
        lines = [f"def f{i}(x):\n    return x * {i} + {i * i % 17}  # {part}\n\n" for i in range(60)]
        (folder / f"{part}.txt").write_text("".join(lines))
    return {
        "objective": "denoise", "seed": 1, "model": {"width": 16, "num_heads": 2, "num_core_layers": 1},
        "recurrence": {"mean": 2, "backprop": 1}, "denoise": {"cond_width": 8, "target": {"dim": 4}},
        "data": {"path": str(folder), "cache_dir": str(place / "tokens"), "vocab_size": 300, "length": 16,
                 "heldout": 0.2},
        "optim": {"ema_decay": 0.5},
        "training": {"budget": 4, "batch_size": 2, "threads": 1, "checkpoint_every": 2},
        "evaluation": {"num_sequences": 2, "sample_length": 2, "prompt_length": 4, "depths": [1]},
    }


# ---- configs ---------------------------------------------------------------------------------------------------------

junk = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
                 st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2))


@st.composite
def broken_configs(draw, base):
    """The bytes of a config file in which something is wrong."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode())))
    config = json.loads(json.dumps(base))
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from([config, *(v for v in config.values() if isinstance(v, dict))]))
        known = Config.model_fields if section is config else section
        name = draw(st.one_of(st.sampled_from(sorted(known)), st.text(min_size=1, max_size=8)))
        section[name] = draw(junk)
    return yaml.safe_dump(config, allow_unicode=draw(st.booleans())).encode()


def check_config(place, content):
    path = place / "broken.yaml"
    path.write_bytes(content)
    try:
        load_config(path)
    except UserError:
        complaint("train", path, "--run", place / "never", "--dry-run")
        complaint("train", path, "--run", place / "never")
        assert not (place / "never").exists()
        assert path.read_bytes() == content
    else:
        assume(False)  # what was drawn happens to be a config


# ---- data ------------------------------------------------------------------------------------------------------------

NAMES = ["a.txt", "a.jsonl", "a.parquet", "a.json", "a.py", "a", "tokenizer.json"]
lines = st.one_of(st.binary(max_size=30), st.sampled_from([
    b'{"text": "fine"}', b'{"text": 3}', b'{"txt": ""}', b"[1]", b'{"text": "\\ud800"}', b"PAR1", b"\xff\xfe"]))


def check_data(place, base, name, content, where):
    """The config works on good text; here its text or its tokenizer is a broken file."""
    work = place / f"data{next(numbers)}"
    folder = work / "text"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    config = json.loads(json.dumps(base))
    target = {"file": folder / name, "folder": folder, "glob": f"{folder}/*", "missing": folder / "b.txt"}[where]
    config["data"]["tokenizer" if name == "tokenizer.json" else "path"] = str(target)
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    complaint("train", work / "config.yaml", "--run", work / "run")
    assert (folder / name).read_bytes() == content
    assert not (work / "run" / "checkpoints").exists()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(place, base):
    path = place / "base.yaml"
    path.write_text(yaml.safe_dump(base))
    assert main(["train", str(path), "--run", str(place / "run")]) == 0
    return place / "run"


FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]
DAMAGES = ["cut", "flip", "noise", "remove", "empty", "folder", "longer"]


def damage(path: Path, how: str, where: float, noise: bytes) -> None:
    content = path.read_bytes()
    at = int(where * len(content))
    if how == "flip":
        content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    new = {"cut": content[:at], "flip": content, "noise": noise, "empty": b"", "longer": content + b"x"}.get(how)
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif new is not None:
        path.write_bytes(new)


def check_checkpoint(run, name, how, where, noise, verb):
    """Every checkpoint of the run has the damage, so that there is none to fall back to."""
    copy = run.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy, symlinks=True)
    for folder in (copy / "checkpoints").iterdir():
        damage(folder / name, how, where, noise)
    before = contents(copy)
    if verb == "train":
        complaint("train", copy / "config.yaml")
    else:
        complaint(verb, copy)
    assert contents(copy).items() >= before.items()


# ---- a few, and a thousand -------------------------------------------------------------------------------------------


def config_faults(place, base, number):
    examples(number)(given(content=broken_configs(base))(lambda content: check_config(place, content)))()


def data_faults(place, base, number):
    draw = given(name=st.sampled_from(NAMES), content=st.lists(lines, max_size=4).map(b"\n".join),
                 where=st.sampled_from(["file", "folder", "glob", "missing"]))
    examples(number)(draw(lambda name, content, where: check_data(place, base, name, content, where)))()


def checkpoint_faults(run, number):
    draw = given(name=st.sampled_from(FILES), how=st.sampled_from(DAMAGES), where=st.floats(0, 0.999),
                 noise=st.binary(max_size=40), verb=st.sampled_from(["train", "eval", "generate", "info"]))
    examples(number)(draw(lambda **drawn: check_checkpoint(run, **drawn)))()


def test_broken_configs(place, base):
    config_faults(place, base, FEW)


def test_broken_data(place, base):
    data_faults(place, base, FEW)


def test_broken_checkpoints(run):
    checkpoint_faults(run, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["config", "data", "checkpoint"])
def test_a_thousand(kind, place, base, run):
    {"config": lambda: config_faults(place, base, MANY), "data": lambda: data_faults(place, base, MANY),
     "checkpoint": lambda: checkpoint_faults(run, MANY)}[kind]()


def test_the_check_can_fail(run):
    """The positive control: a sound run is not complained about."""
    with pytest.raises(AssertionError, match="exit code 0"):
        complaint("generate", run, "--num-tokens", "2")


def test_an_older_checkpoint_stands_in_for_a_damaged_one(run):
    copy = run.parent / "older"
    shutil.copytree(run, copy, symlinks=True)
    damage(copy / "checkpoints" / "step-00000004" / "model.safetensors", "cut", 0.5, b"")
    assert main(["generate", str(copy), "--num-tokens", "2"]) == 0
    assert main(["train", str(copy / "config.yaml")]) == 0
    assert contents(copy)["checkpoints/step-00000004/model.safetensors"] == contents(run)[
        "checkpoints/step-00000004/model.safetensors"]
