"""A manifest stands for the text: nothing is read where nothing has changed, and any change of content is noticed."""

import json
import os
import subprocess
import sys
import time
import warnings

import pytest

from looped.config.data import DataConfig
from looped.data import corpus as corpus_module
from looped.data import manifest, text_sources
from looped.data.text import find_text, prepare

datasets = pytest.importorskip("datasets")
OLD = time.time_ns() - 10**12


def age(*paths, ns=OLD):
    for path in paths:
        os.utime(path, ns=(ns, ns))


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read, and hashed, from here on."""
    found = {"read": [], "hashed": []}
    for module in (text_sources, corpus_module):
        original = module.read_file
        monkeypatch.setattr(module, "read_file", lambda path, name, *, original=original, **settings: (
            found["read"].append(name) or original(path, name, **settings)))
    hash_of = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path: found["hashed"].append(path.name) or hash_of(path))
    return found


def key(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find_text(data).fingerprint


def test_a_second_start_reads_and_hashes_no_file(make, texts, read):
    age(*texts.iterdir())
    first = prepare(make())
    assert len(read["read"]) == 3 * 40  # the control: to be hashed, to train the tokenizer, to be encoded
    read["read"].clear(), read["hashed"].clear()
    second = prepare(make())
    assert read == {"read": [], "hashed": []}
    assert (second.facts, second.fingerprint) == (first.facts, first.fingerprint)
    assert tuple(second.train.documents) == tuple(first.train.documents)


def test_a_touched_file_is_hashed_once_and_nothing_is_read(make, texts, read):
    age(*texts.iterdir())
    before = key(make())
    age(texts / "07.txt", ns=OLD + 1)
    read["read"].clear(), read["hashed"].clear()
    assert [key(make()), key(make())] == [before, before]
    assert read == {"read": [], "hashed": ["07.txt"]}


def test_a_new_file_is_not_vouched_for_by_its_time(make, texts, read):
    """One that is written twice within a tick of the file system's clock has one size and one time."""
    file, now = texts / "03.txt", time.time_ns()
    age(*texts.iterdir(), ns=now)
    before = key(make())
    file.write_text(file.read_text(encoding="utf-8").replace("fox", "box"), encoding="utf-8")
    age(file, ns=now)
    assert key(make()) != before


@pytest.mark.parametrize("change", ["content", "size", "added", "removed", "renamed"])
def test_a_change_of_any_file_is_noticed(make, texts, change):
    age(*texts.iterdir())
    before, file = key(make()), texts / "39.txt"
    content = file.read_text(encoding="utf-8")
    if change == "content":
        file.write_text(content.replace("fox", "box"), encoding="utf-8")
    elif change == "size":
        file.write_text(content + "more", encoding="utf-8")
        age(file)
    elif change == "added":
        (texts / "40.txt").write_text("more", encoding="utf-8")
    elif change == "removed":
        file.unlink()
    else:
        file.rename(texts / "zz.txt")
    assert key(make()) != before


def test_the_times_of_files_are_no_part_of_the_fingerprint(make, texts, tmp_path):
    before = key(make())
    age(*texts.iterdir())
    assert key(make(cache_dir=str(tmp_path / "other"))) == before


def test_of_a_text_that_is_cut_off_the_unread_files_may_change_and_the_notice_comes_again(make, texts, read):
    age(*texts.iterdir())
    said = "cuts the text off in 04.txt, its document 5 in reading order; of 40 files found .*, 35 are not read"
    size = sum((texts / f"{number:02}.txt").stat().st_size for number in range(4))
    with pytest.warns(UserWarning, match=said):
        before = find_text(make(max_bytes=size + 9)).fingerprint
    assert read["hashed"] == [f"{number:02}.txt" for number in range(4)]
    (texts / "20.txt").write_text("other", encoding="utf-8")
    read["read"].clear(), read["hashed"].clear()
    with pytest.warns(UserWarning, match=said):
        assert find_text(make(max_bytes=size + 9)).fingerprint == before
    assert read == {"read": [], "hashed": []}
    (texts / "04.txt").write_text("other text", encoding="utf-8")  # read in part, so never hashed
    assert key(make(max_bytes=size + 9)) != before


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"files": 3}', '{"num_files": 40, "files": [[1]]}'])
def test_a_broken_manifest_is_written_anew(make, tmp_path, content):
    before = key(make())
    (file,) = (tmp_path / "cache" / manifest.FOLDER).glob("*.json")
    file.write_text(content, encoding="utf-8")
    assert key(make()) == before
    assert json.loads(file.read_text(encoding="utf-8"))["known"]["fingerprint"] == before


def test_a_cache_that_cannot_be_written_costs_a_reading_and_is_no_error(make, tmp_path, read):
    (tmp_path / "file").write_text("")
    data = make(cache_dir=str(tmp_path / "file" / "below"))
    assert key(data) == key(data) == key(make())
    assert len(read["read"]) == 3 * 40


def test_the_standard_library_is_read_once(tmp_path, read):
    data = DataConfig(cache_dir=str(tmp_path), max_bytes=300_000)
    before = key(data)
    assert read["read"]
    read["read"].clear()
    assert key(data) == before
    assert read["read"] == []


def test_a_dataset_is_known_by_the_files_of_its_local_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "train.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(50)), encoding="utf-8")
    data = DataConfig(dataset=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    before, each, rows = key(data), text_sources.DatasetSource.guarded, []
    monkeypatch.setattr(text_sources.DatasetSource, "guarded", lambda self, given: (
        rows.append(row) or row for row in each(self, given)))
    assert key(data) == before
    assert rows == []
    file.write_text(json.dumps({"text": "other"}) + "\n" + json.dumps({"text": "rows"}), encoding="utf-8")
    assert key(data) != before
    assert len(rows) == 2  # the control


def test_rows_in_memory_have_no_files_and_are_read_every_time(tmp_path, monkeypatch):
    data = DataConfig(dataset="some/name", cache_dir=str(tmp_path / "cache"))
    keys = []
    for texts in (["one", "two"], ["one", "three"]):
        rows = datasets.Dataset.from_list([{"text": text} for text in texts])
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, rows=rows, **__: rows)
        keys.append(key(data))
    assert keys[0] != keys[1]


def test_a_stream_arrives_once_however_often_its_text_is_read(tmp_path, monkeypatch):
    arrived = []

    def rows():
        for number in range(200):
            arrived.append(number)
            yield {"text": f"row {number}: a text of some\nlines and \x00 signs é"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    data = DataConfig(dataset="endless", streaming=True, max_bytes=2000, vocab_size=300, length=4, heldout=0.2,
                      cache_dir=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="of an unknown number of rows, the first 47 are read"):
        text = prepare(data)
    assert arrived == list(range(47))
    decoded = text.tokenizer.decode(text.train.tokens.tolist()) + text.tokenizer.decode(text.heldout.tokens.tolist())
    assert len(decoded.encode()) == 2000


def test_processes_at_once_read_the_text_once(make, texts, tmp_path):
    """The second waits for the manifest of the first; each line of `log` is a reading."""
    code = ("import sys, time, pathlib\nfrom looped.config.data import DataConfig\nfrom looped.data import text\n"
            "survey = text._survey\n"
            "def slow(*arguments):\n"
            f"    with open({str(tmp_path / 'log')!r}, 'a') as log: log.write('read\\n')\n"
            "    time.sleep(1)\n"
            "    return survey(*arguments)\n"
            "text._survey = slow\nprint('ready', flush=True)\nsys.stdin.readline()\n"
            f"print(text.find_text(DataConfig(**{make().model_dump()!r})).fingerprint)")
    age(*texts.iterdir())
    started = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for _ in range(2)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    said = {process.communicate(timeout=60)[0] for process in started}
    assert said == {f"{key(make())}\n"}
    assert (tmp_path / "log").read_text() == "read\n"
