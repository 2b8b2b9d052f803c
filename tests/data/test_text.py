"""`prepare`: streams that decode to the documents, exact bytes, and a cache that is never stale, torn or half there."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from looped.config.data import DataConfig
from looped.data import text as text_module
from looped.data import token_cache
from looped.data.corpus import load_corpus
from looped.data.text import prepare
from looped.data.token_cache import FILES, NAMES
from looped.data.tokenizer import PROBE
from looped.errors import UserError


def folders(tmp_path):
    return [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]


def test_both_streams_decode_to_their_documents_and_bytes_a_token_is_exact(make):
    data = make()
    text = prepare(data)
    for stream, documents in zip((text.train, text.heldout), load_corpus(data).split(data.heldout), strict=True):
        assert text.tokenizer.decode(stream.tokens.tolist()) == "".join(document.text for document in documents)
        assert int((stream.tokens == text.tokenizer.end_of_text).sum()) == len(documents)
        assert tuple(stream.documents) == tuple(document.name for document in documents)
    heldout_bytes = len(text.tokenizer.decode(text.heldout.tokens.tolist()).encode())
    assert text.bytes_per_token == heldout_bytes / len(text.heldout)


def test_a_uniform_guess_over_bytes_costs_eight_bits_a_byte(make):
    text = prepare(make())
    nats = 8 * math.log(2) * text.bytes_per_token  # of a token, when each of its bytes costs 8 bits
    assert text.nats_to_bits_per_byte(nats) == pytest.approx(8)


def test_the_second_call_reads_the_cache_and_gives_the_same(make, monkeypatch):
    first = prepare(make())
    monkeypatch.setattr(token_cache, "_build", None)  # may not be called
    second = prepare(make())
    assert second.fingerprint == first.fingerprint
    for name in ("train", "heldout"):
        assert np.array_equal(getattr(first, name).tokens, getattr(second, name).tokens)
    assert second.summary == first.summary


@pytest.mark.parametrize("change", ["text", "name", "heldout", "vocab_size", "tokenizer"])
def test_whatever_the_tokens_depend_on_changes_the_key(make, texts, tmp_path, change):
    before = prepare(make())
    other = {"heldout": {"heldout": 0.3}, "vocab_size": {"vocab_size": 290}}.get(change, {})
    if change == "text":
        (texts / "03.txt").write_text((texts / "03.txt").read_text().replace("fox", "box", 1))
    elif change == "name":
        (texts / "03.txt").rename(texts / "03b.txt")
    elif change == "tokenizer":
        (tmp_path / "t.json").write_text(before.tokenizer.json(), encoding="utf-8")
        other = {"tokenizer": str(tmp_path / "t.json")}
    assert prepare(make(**other)).fingerprint != before.fingerprint


def test_what_the_tokens_do_not_depend_on_leaves_the_key(make, texts):
    before = prepare(make()).fingerprint
    assert prepare(make(length=8)).fingerprint == before
    moved = texts.rename(texts.with_name("moved"))
    assert prepare(make(path=str(moved))).fingerprint == before


def test_the_tokenizer_is_trained_on_the_training_side_alone(make, monkeypatch):
    seen = []
    train = text_module.train_tokenizer
    monkeypatch.setattr(text_module, "train_tokenizer", lambda texts, size: train(seen.append(list(texts)) or seen[0],
                                                                                  size))
    prepare(make())
    assert seen == [[document.text for document in load_corpus(make()).split(0.2)[0]]]


def test_a_loaded_tokenizer_decides_the_vocabulary(make, tmp_path):
    trained = prepare(make()).tokenizer
    (tmp_path / "t.json").write_text(trained.json(), encoding="utf-8")
    text = prepare(make(tokenizer=str(tmp_path / "t.json"), vocab_size=5000))
    assert text.vocab_size == trained.vocab_size == 300


def test_a_vocabulary_the_text_cannot_fill_is_reported_and_not_padded(make):
    with pytest.warns(UserWarning, match=r"data\.vocab_size 50000: the text supports only (\d+) tokens; the vocab"):
        text = prepare(make(vocab_size=50_000))
    assert text.vocab_size == text.tokenizer.vocab_size < 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(make())  # the control: nothing is said where the size is met


def test_the_cache_folder_comes_from_the_config_then_the_environment(make, tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPED_CACHE", str(tmp_path / "elsewhere"))
    prepare(make())
    assert not (tmp_path / "elsewhere").exists()
    prepare(make(cache_dir=None))
    assert (tmp_path / "elsewhere" / prepare(make()).fingerprint / "train.bin").exists()


def test_large_vocabularies_are_stored_in_four_bytes(make, tmp_path):
    content = json.loads(prepare(make()).tokenizer.json())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "<far>"})
    content["added_tokens"] += [{**content["added_tokens"][0], "id": 301 + i, "content": f"<{i}>"}
                                for i in range(66_000)]
    (tmp_path / "t.json").write_text(json.dumps(content), encoding="utf-8")
    data = make(tokenizer=str(tmp_path / "t.json"))
    text = prepare(data)
    assert (text.vocab_size, text.train.tokens.dtype) == (66_301, np.uint32)
    assert text.tokenizer.decode(text.train.tokens.tolist()) == "".join(
        document.text for document in load_corpus(data).split(data.heldout)[0])


def test_a_tokenizer_that_loses_a_character_of_one_training_document_is_refused_by_its_name(make, texts, tmp_path):
    characters = sorted(set(PROBE) | {chr(code) for code in range(32, 127)} | set("äöü"))
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate([*characters, "</s>"])}, []))
    backend.decoder = decoders.Fuse()
    backend.save(str(tmp_path / "t.json"))
    data = make(tokenizer=str(tmp_path / "t.json"))
    assert prepare(data).vocab_size == len(characters) + 1  # the control: nothing is lost of these texts
    name = load_corpus(data).split(data.heldout)[0][0].name
    (texts / name).write_text("ein Fuß\n" * 30, encoding="utf-8")
    with pytest.raises(UserError, match=rf"does not decode what it encodes \(in {name} 'ß.*' comes back as "):
        prepare(data)


# Damage

def flip(path, data):
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)


def cut(path, data):
    os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 1)))


def grow(path, data):
    path.write_bytes(path.read_bytes() + data.draw(st.binary(min_size=1, max_size=9)))


def remove(path, data):
    path.unlink()


def become_a_folder(path, data):
    path.unlink()
    path.mkdir()


@given(st.sampled_from([flip, cut, grow, remove, become_a_folder]),
       st.sampled_from([*FILES, *NAMES, "meta.json"]), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_the_cache_is_noticed_or_harmless_and_the_tokens_are_the_same(make, tmp_path, harm, name, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good = prepare(make())
        expected = good.train.tokens.tolist(), good.heldout.tokens.tolist(), good.tokenizer.json()
        (folder,) = folders(tmp_path)
        harm(folder / name, data)
        again = prepare(make())
    assert (again.train.tokens.tolist(), again.heldout.tokens.tolist(), again.tokenizer.json()) == expected


@pytest.mark.parametrize("name", [*FILES, *NAMES, "meta.json"])
def test_a_damaged_cache_is_rebuilt_with_one_line_of_notice(make, tmp_path, name):
    prepare(make())
    (folder,) = folders(tmp_path)
    (folder / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match="the token cache .* is damaged .* and is rebuilt") as notices:
        prepare(make())
    assert len(notices) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(make())
    assert [path.name for path in folders(tmp_path)] == [folder.name]


def test_a_file_in_place_of_the_cache_folder_is_replaced(make, tmp_path):
    key = prepare(make()).fingerprint
    shutil.rmtree(tmp_path / "cache" / key)
    (tmp_path / "cache" / key).write_text("x")
    with pytest.warns(UserWarning, match="damaged"):
        assert prepare(make()).fingerprint == key


def test_a_build_that_was_killed_leaves_nothing_behind_after_the_next(make, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "sha256_of", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(make())
    assert not folders(tmp_path)
    prepare(make())
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.endswith(".building")] == []
    assert len(folders(tmp_path)) == 1


def test_processes_at_once_build_one_good_cache_where_there_is_none_and_where_it_is_damaged(make, tmp_path):
    absent, damaged = make(), make(vocab_size=290)
    (tmp_path / "cache" / prepare(damaged).fingerprint / "train.bin").write_bytes(b"x")
    start = tmp_path / "start"
    code = ("import sys, time, pathlib, hashlib\nfrom looped.config.data import DataConfig\n"
            "from looped.data.text import prepare\nprint('ready', flush=True)\n"
            f"while not pathlib.Path({str(start)!r}).exists(): time.sleep(0.001)\n"
            f"for settings in ({absent.model_dump()!r}, {damaged.model_dump()!r}):\n"
            "    data = prepare(DataConfig(**settings))\n"
            "    print(hashlib.sha256(data.train.tokens.tobytes() + data.heldout.tokens.tobytes()).hexdigest())")
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    start.touch()
    printed = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(printed) == 1
    assert {path.name for path in folders(tmp_path)} == {prepare(data).fingerprint for data in (absent, damaged)}


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_folder_that_cannot_be_is_an_error_with_the_way_out(make, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the token cache .* cannot be used .*set data\.cache_dir or \$LOOPED_CACHE"):
        prepare(make(cache_dir=str(tmp_path / place)))


@pytest.mark.parametrize(("settings", "side"), [({"length": 100_000}, "train"), ({"length": 2500}, "held-out")])
def test_a_side_shorter_than_a_window_is_refused_at_once(make, settings, side):
    with pytest.raises(UserError, match=rf"the {side} text has \d+"):
        prepare(make(**settings))


def test_the_standard_library_makes_a_useful_corpus_and_is_fast_the_second_time(tmp_path):
    data = DataConfig(cache_dir=str(tmp_path), max_bytes=2_000_000)
    text = prepare(data)
    start = time.perf_counter()
    prepare(data)
    assert time.perf_counter() - start < 5  # 0.1 s where nothing else runs
    assert (text.vocab_size, text.bytes_per_token > 2) == (1024, True)
    assert text.heldout.windows(data.length) > 50
