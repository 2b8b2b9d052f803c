"""The folder of tokens: built in pieces that survive an interruption, and the same however it was built."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from looped.data import compressed_files, documents, formats, token_cache
from looped.data import text as text_module
from looped.data.documents import Document, LongDocument, cut_in_two, pieces_of
from looped.data.text import prepare
from looped.data.token_cache import NAMES, Names
from looped.data.tokenizer import TextTokenizer
from looped.errors import UserError


def tokens_of(text):
    return (text.train.tokens.tolist(), text.heldout.tokens.tolist(), tuple(text.train.documents),
            tuple(text.heldout.documents), text.facts)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 50 characters, of which 20 are encoded at once, and saved after each time."""
    monkeypatch.setattr(documents, "PIECE", 50)
    monkeypatch.setattr(token_cache, "BATCH", 1000)
    monkeypatch.setattr(token_cache, "SAVE_EVERY", 1)


# Interruption

@pytest.mark.parametrize("after", [0, 1, 5, 17])
def test_an_interrupted_build_goes_on_from_the_pieces_that_are_done(make, tmp_path, monkeypatch, small_pieces, after):
    whole = tokens_of(prepare(make(cache_dir=str(tmp_path / "undisturbed"))))
    encode, calls = TextTokenizer.encode_pieces, []

    def interrupted(self, pieces):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(len(pieces))
        return encode(self, pieces)
    with monkeypatch.context() as patch:
        patch.setattr(TextTokenizer, "encode_pieces", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(make())
    (fresh,) = (tmp_path / "cache").glob(".*.building/fresh")
    with (fresh / "train.bin").open("ab") as file:
        file.write(b"written, but not recorded")
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(TextTokenizer, "encode_pieces", lambda self, pieces: again.append(len(pieces)) or
                      encode(self, pieces))
        patch.setattr(text_module, "train_tokenizer", None)  # may not be called
        assert tokens_of(prepare(make())) == whole
    assert len(again) > 0
    total = sum(1 for file in (tmp_path / "texts").iterdir()
                for _ in pieces_of([file.read_text(encoding="utf-8")]))
    assert sum(calls) + sum(again) == total
    assert [path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".building")] == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pieces": 3, "what": 1}', '{"sizes": {"train.bin": 1000000000}}',
                                     '{"pieces": 3, "format": 0}'])
def test_a_record_of_progress_that_cannot_be_is_not_followed(make, tmp_path, monkeypatch, small_pieces, content):
    whole = tokens_of(prepare(make(cache_dir=str(tmp_path / "undisturbed"))))
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_write_meta", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            prepare(make())
    (fresh,) = (tmp_path / "cache").glob(".*.building/fresh")
    (fresh / "progress.json").write_text(content, encoding="utf-8")
    assert tokens_of(prepare(make())) == whole


def test_a_killed_holder_leaves_no_lock_and_another_builds(make, tmp_path):
    code = ("import sys, time\nfrom looped.config.data import DataConfig\nfrom looped.data import text, token_cache\n"
            "def stuck(*_):\n    print('building', flush=True)\n    time.sleep(600)\n"
            "token_cache._encode = stuck\n"
            f"text.prepare(DataConfig(**{make().model_dump()!r}))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    begun = time.perf_counter()
    assert prepare(make()).vocab_size == 300
    assert time.perf_counter() - begun < 30


def test_a_source_that_changes_between_readings_is_an_error_and_nothing_is_kept(make, texts, tmp_path, monkeypatch):
    train = text_module.train_tokenizer

    def meanwhile(pieces, size):
        trained = train(pieces, size)
        (texts / "20.txt").write_text("other", encoding="utf-8")
        return trained
    with monkeypatch.context() as patch:
        patch.setattr(text_module, "train_tokenizer", meanwhile)
        with pytest.raises(UserError, match="was changed while it was read; start again when nothing writes to it"):
            prepare(make())
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert [name for name in left if not name.endswith((".lock", "manifests"))] == []
    prepare(make())


# Folders of earlier versions

def test_a_folder_of_an_earlier_version_is_used_and_gets_its_names(make, tmp_path, monkeypatch):
    whole = tokens_of(prepare(make()))
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for name in NAMES:
        (folder / name).unlink()
        del meta["sha256"][name]
    (folder / "meta.json").write_text(json.dumps({"format": 1, "sha256": meta["sha256"]}), encoding="utf-8")
    monkeypatch.setattr(token_cache, "_build", None)  # may not be called
    assert tokens_of(prepare(make())) == whole
    monkeypatch.setattr(token_cache, "_describe", None)
    assert tokens_of(prepare(make())) == whole


def test_tokens_that_have_not_changed_are_not_hashed_again_and_copied_ones_are_once(make, tmp_path, monkeypatch):
    prepare(make())
    hashed, hash_of = [], token_cache.sha256_of
    monkeypatch.setattr(token_cache, "sha256_of", lambda path: hashed.append(path.name) or hash_of(path))
    prepare(make())
    assert hashed == []
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
    old = time.time_ns() - 10**11
    os.utime(folder / "train.bin", ns=(old, old))
    prepare(make())
    prepare(make())
    assert hashed == ["train.bin"]


# Long documents

@given(st.text("ab\n", max_size=80), st.lists(st.integers(1, 20), max_size=20), st.integers(1, 12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_do_not_depend_on_the_parts(monkeypatch, text, cuts, size):
    monkeypatch.setattr(documents, "PIECE", size)
    parts, left = [], text
    for cut in cuts:
        parts, left = [*parts, left[:cut]], left[cut:]
    whole = list(pieces_of([text]))
    assert list(pieces_of([*parts, left])) == whole
    assert "".join(whole) == text
    assert all(len(piece) <= size for piece in whole)


@given(st.text("ab\né🙂", min_size=2, max_size=60), st.integers(1, 9), st.floats(0.01, 0.99))
def test_a_long_document_is_cut_where_a_short_one_is(text, size, share):
    long = LongDocument("a", lambda: (text[start : start + size] for start in range(0, len(text), size)))
    short = cut_in_two(Document("a", text), share)
    assert [(each.name, each.text) for each in cut_in_two(long, share)] == list(short)
    middle = min(max(round(len(text) * (1 - share)), 1), len(text) - 1)
    near = (len(text) - middle) // 2
    places = [text.rfind("\n", max(middle - near, 0), middle) + 1, text.find("\n", middle, middle + near) + 1]
    assert len(short[0].text) == min(filter(None, places), key=lambda place: abs(place - middle), default=middle)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("max_bytes", [10**9, 15_001, 15_002, 15_003, 45_001])
@pytest.mark.filterwarnings("ignore:data.max_bytes")
def test_a_file_read_in_parts_gives_the_tokens_of_one_read_whole(make, tmp_path, monkeypatch, files, max_bytes):
    for number in range(files):
        text = "\ufeff" * (number == 0) + "".join(f"line {i} of {number}: naïve 🙂 fox\n" for i in range(900))
        (tmp_path / f"long{number}.txt").write_text(text, encoding="utf-8")
    data = make(path=str(tmp_path / "long*.txt"), max_bytes=max_bytes)
    whole = tokens_of(prepare(data))
    monkeypatch.setattr(formats, "LONG", 1000)
    monkeypatch.setattr(compressed_files, "PART", 77)
    monkeypatch.setattr(token_cache, "BATCH", 500)
    read, parts = formats.read_utf8, []
    monkeypatch.setattr(formats, "read_utf8", lambda path, limit: parts.append(path) or read(path, limit))
    assert tokens_of(prepare(make(path=data.path, max_bytes=max_bytes, cache_dir=str(tmp_path / "second")))) == whole
    assert parts == []  # the control: none was read whole


@pytest.mark.parametrize(("end", "says"), [(b"\x00" + b"x" * 5000, "is binary (a zero byte at offset 5000)"),
                                           (b"\xff" + b"x" * 5000, "is not UTF-8 (byte 0xff at offset 5000)"),
                                           (b"\xc3", "is not UTF-8 (byte 0xc3 at offset 5000)")])
def test_a_bad_byte_deep_in_a_long_file_is_named(make, tmp_path, monkeypatch, end, says):
    monkeypatch.setattr(formats, "LONG", 1000)
    monkeypatch.setattr(compressed_files, "PART", 77)
    (tmp_path / "a.txt").write_bytes(b"x" * 5000 + end)
    with pytest.raises(UserError) as error:
        prepare(make(path=str(tmp_path / "a.txt")))
    assert says in str(error.value)


def test_names_are_read_one_by_one_and_in_slices(tmp_path):
    names = ["a", "", "ö/b#3", "x\udcff", "line\nbreak"]
    (tmp_path / "n").write_bytes(b"".join(token_cache._named(name) for name in names))
    read = Names(tmp_path / "n", len(names))
    assert (list(read), read[1:4], read[-1], len(read)) == (names, tuple(names[1:4]), names[-1], 5)
    with pytest.raises(IndexError):
        read[5]


# Memory

@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_the_peak_does_not_grow_with_the_text(tmp_path, form):
    script = Path(__file__).parents[2] / "scripts" / "prepare_scale.py"
    said = subprocess.run([sys.executable, str(script), "--megabytes", "20", "80", "--starts", "2", "--form", form],
                          capture_output=True, text=True, check=True).stdout
    peaks = [int(line.split(" MB")[-2].split()[-1]) for line in said.splitlines()]
    assert np.diff(peaks[::2]) < 40  # 60 MB more text
    assert peaks[3] - peaks[1] < 10
