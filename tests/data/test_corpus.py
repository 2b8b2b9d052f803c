"""The corpus: what the standard library, files and `datasets` give, and a split that depends on names alone."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looped.config.data import DataConfig
from looped.data import corpus as corpus_module
from looped.data.corpus import Corpus, load_corpus
from looped.data.text_sources import Document
from looped.errors import UserError

datasets = pytest.importorskip("datasets")
ROWS = [{"id": number, "text": f"row {number}: naïve text"} for number in range(50)]


def texts_of(**settings):
    return [document.text for document in load_corpus(DataConfig(**settings)).documents]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# The standard library

def test_the_standard_library_is_the_default_and_is_sorted_by_name():
    names = [document.name for document in load_corpus(DataConfig(max_bytes=10**9)).documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics/lambda"} <= set(names)


def test_a_standard_library_of_any_layout_is_read_without_tests_bundles_and_topics_twice(tmp_path, monkeypatch):
    kept = ["abc.py", "json/__init__.py", "lib2to3/main.py", "ensurepip/__init__.py"]
    left = ["test/test_abc.py", "idlelib/idle_test/a.py", "lib2to3/tests/a.py", "site-packages/x/a.py", "abc.pyc",
            "dist-packages/a.py", "ensurepip/_bundled/a.py", "config-3.14-x86_64/a.py", "_sysconfigdata_linux.py",
            "__pycache__/abc.py", "pydoc_data/topics.py", "sitecustomize.py", "encodings/cp037.py"]
    for name in kept + left:
        write(tmp_path / name, f"# {name}\n")
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(corpus_module, "_pydoc_topics", lambda: {"pydoc_data/topics/if": "The if statement"})
    names = [document.name for document in corpus_module.StandardLibrary(10**9).documents()]
    assert names == sorted([*kept, "pydoc_data/topics/if"])


def test_a_python_without_sources_on_disk_is_told_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(corpus_module, "_pydoc_topics", dict)
    with pytest.raises(UserError, match=r"holds no text; point data\.path"):
        load_corpus(DataConfig())


# max_bytes

@pytest.mark.parametrize("max_bytes", [1, 10, 100, 1000, 1001, 1002])
def test_text_beyond_max_bytes_is_not_read_and_characters_stay_whole(texts, max_bytes):
    whole = "".join(texts_of(path=str(texts))).encode()
    taken = "".join(texts_of(path=str(texts), max_bytes=max_bytes)).encode()
    assert whole.startswith(taken)
    assert max_bytes - 3 <= len(taken) <= max_bytes


# Files

def test_files_folders_and_globs_are_read_once_each_in_order(tmp_path):
    write(tmp_path / "b" / "deep" / "2.md", "two")
    write(tmp_path / "b" / "1.txt", "one")
    write(tmp_path / "b" / ".git" / "x.txt", "hidden")
    write(tmp_path / "b" / "picture.png", "not text for a folder")
    write(tmp_path / "a.odd", "named")
    assert texts_of(path=str(tmp_path / "b")) == ["one", "two"]
    assert texts_of(path=(str(tmp_path / "a.odd"), str(tmp_path / "b"))) == ["named", "one", "two"]
    assert texts_of(path=(str(tmp_path / "**" / "*.md"), str(tmp_path / "b"))) == ["two", "one"]
    assert texts_of(path=str(tmp_path / "b" / "*.png")) == ["not text for a folder"]


def test_names_are_relative_so_moving_a_folder_moves_no_document_to_the_other_side(tmp_path):
    for root in ("one", "two/three"):
        write(tmp_path / root / "sub" / "a.txt", "text")
    names = [load_corpus(DataConfig(path=str(tmp_path / root))).documents[0].name for root in ("one", "two/three")]
    assert names == ["sub/a.txt", "sub/a.txt"]


def test_the_same_name_in_two_folders_is_told_apart(tmp_path):
    for root in ("one", "two"):
        write(tmp_path / root / "a.txt", root)
    corpus = load_corpus(DataConfig(path=(str(tmp_path / "one"), str(tmp_path / "two"))))
    assert [document.name for document in corpus.documents] == ["a.txt", "a.txt~2"]
    assert all(corpus.split(0.5))


def test_text_is_kept_byte_for_byte(tmp_path):
    raw = "line\r\nline\rnaïve\ufeff\n\n\t🙂\u2028\x85\f".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    assert texts_of(path=str(tmp_path / "a.txt")) == [raw.decode()]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_every_row_of_json_lines_and_parquet_is_a_document(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        opener = gzip.open if suffix.endswith("gz") else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.write("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert texts_of(path=str(path)) == [row["text"] for row in ROWS]
    assert texts_of(path=str(tmp_path)) == [row["text"] for row in ROWS]


def test_null_and_empty_texts_are_no_documents(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": null}\n{"text": ""}\n{"text": "x"}\n')
    corpus = load_corpus(DataConfig(path=str(tmp_path / "a.jsonl")))
    assert corpus.documents == (Document("a.jsonl#3", "x"),)


# datasets

@pytest.fixture
def local_datasets(tmp_path, monkeypatch):
    """Folders that `load_dataset` reads, by format."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    write(tmp_path / "json" / "train.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "parquet").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "parquet" / "train-0.parquet"))
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_dataset_gives_its_rows_in_order_streamed_or_not(local_datasets, form, streaming):
    source = {"dataset": str(local_datasets / form), "streaming": streaming}
    assert texts_of(**source) == [row["text"] for row in ROWS]
    assert texts_of(**source, max_bytes=36) == [ROWS[0]["text"], ROWS[1]["text"]]


def test_streaming_stops_reading_at_max_bytes(monkeypatch):
    def endless():
        number = 0
        while True:
            assert number < 1000, "the stream is read on after max_bytes"
            yield {"text": f"row {number}"}
            number += 1
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda *_, **__: datasets.IterableDataset.from_generator(endless))
    assert len("".join(texts_of(dataset="endless", streaming=True, max_bytes=500))) == 500


# The split

names = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=30, unique=True)
shares = st.floats(0.01, 0.99)


def sides(names, share):
    train, heldout = Corpus(tuple(Document(name, "text") for name in names), "test").split(share)
    return {document.name for document in train}, {document.name for document in heldout}


@given(names, shares)
@settings(max_examples=50)
def test_the_split_is_a_partition_with_no_empty_side_and_ignores_the_order(names, share):
    train, heldout = sides(names, share)
    assert train
    assert heldout
    assert train | heldout == set(names)
    assert not train & heldout
    assert sides(names[::-1], share) == (train, heldout)


def test_a_document_keeps_its_side_whatever_the_others_are():
    names = [f"file{number}.txt" for number in range(1000)]
    train, heldout = sides(names, 0.1)
    for part in (names[:500], names[::3], [*names, *(f"new{number}" for number in range(99))]):
        more_train, more_heldout = sides(part, 0.1)
        assert more_train & set(names) <= train
        assert more_heldout & set(names) <= heldout


def test_about_the_asked_share_is_held_out():
    _, heldout = sides([f"file{number}.txt" for number in range(4000)], 0.1)
    assert 320 < len(heldout) < 480  # 400, sd 19


def test_a_single_document_is_split_at_a_line_break():
    text = "".join(f"line {number}\n" for number in range(1000))
    (head,), (tail,) = Corpus((Document("a", text),), "test").split(0.1)
    assert head.text + tail.text == text
    assert head.text.endswith("\n")
    assert 0.09 < len(tail.text) / len(text) < 0.11


@given(st.text("ab\n", min_size=2, max_size=60), shares)
def test_a_single_document_always_splits_into_two_that_make_it_up(text, share):
    (head,), (tail,) = Corpus((Document("a", text),), "test").split(share)
    assert head.text + tail.text == text
    assert head.text
    assert tail.text


def test_a_far_line_break_does_not_change_the_shares():
    text = "title\n" + "x" * 10_000
    _, (tail,) = Corpus((Document("a", text),), "test").split(0.1)
    assert 0.09 < len(tail.text) / len(text) < 0.11
