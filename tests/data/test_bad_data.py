"""Bad data ends in one sentence that names the place and a way out, never in a traceback of something else."""

import bz2
import gzip
import json

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_sentence import sentence_of

from looped.config.data import DataConfig
from looped.data.corpus import load_corpus
from looped.data.text import prepare
from looped.errors import UserError

datasets = pytest.importorskip("datasets")


def sentence(**settings):
    """The message that loading ends in."""
    return sentence_of(lambda: load_corpus(DataConfig(**settings)))


GOOD = '{"text": "fine"}\n'
BAD_FILES = {
    # name, bytes, what the message must say
    "not utf-8": ("a.txt", "naïve".encode("latin-1") + b" text", "is not UTF-8 (byte 0xef at offset 2); convert it"),
    "utf-16": ("a.txt", "text".encode("utf-16"), "byte-order mark of UTF-16 (ff fe), but text is read as UTF-8; conv"),
    "utf-16 without a mark": ("a.txt", "text".encode("utf-16-le"), "is binary (a zero byte at offset 1); leave it out"),
    "utf-32": ("a.txt", "text".encode("utf-32"), "UTF-32 (ff fe 00 00), but text is read as UTF-8; convert"),
    "utf-16 JSON": ("a.jsonl", GOOD.encode("utf-16"), "begins with the byte-order mark of UTF-16 (ff fe)"),
    "not utf-8 behind a mark": ("a.txt", b"\xef\xbb\xbfna\xef", "is not UTF-8 (byte 0xef at offset 5)"),
    "cut utf-8": ("a.txt", "naï".encode()[:-1], "is not UTF-8 (byte 0xc3 at offset 2)"),
    "binary": ("a.txt", b"GIF89a\x00\x01", "is binary (a zero byte at offset 6)"),
    "empty": ("a.txt", b"", "holds no text; point data.path"),
    "broken line": ("a.jsonl", (GOOD + '{"text": "x"\n').encode(), "line 2 is not JSON (Expecting ',' delimiter"),
    "array cut": ("a.json", b'[\n {"text": "x"},\n {"text": "y"}\n', "line 4 is not JSON (the array has no end)"),
    "array with a gap": ("a.json", b'[{"text": "x"}\n,,{"text": "y"}]', "line 2 is not JSON (Expecting value)"),
    "array without a comma": ("a.json", b'[{"text": "x"}\n{"text": ""}]', "line 2 is not JSON (Expecting ',' delim"),
    "array and more": ("a.json", b'[{"text": "x"}]\n[{"text": "y"}]', "line 2 is not JSON (Extra data after the arr"),
    "array of no objects": ("a.json", b'["x"]', "row 0 holds str, not an object with fields"),
    "array not UTF-8": ("a.json", b'[\n{"text": "x\xff"}]', "is not UTF-8 (byte 0xff at offset 13)"),
    "array with a huge number": ("a.json", b"[" + b"1" * 9999, "line 1 is not JSON (Exceeds the limit"),
    "object cut": ("a.json", b'{\n "text": "x"\n', "line 3 is not JSON (Expecting ',' delimiter)"),
    "inner fields": ("a.jsonl", b'{"meta": {"text": "x", "n": 1}, "i": 2}',
                     "no field 'text'; fields: meta.text, meta.n, i"),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    "JSON not UTF-8": ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}', "line 2 is not JSON ('utf-8' codec"),
    "no object": ("a.jsonl", (GOOD + '"text"\n').encode(), "line 2 holds str, not an object with fields"),
    "no field": ("a.jsonl", b'{"body": "x", "Text": "y"}',
                 "line 1 has no field 'text'; fields: body, Text; did you mean"),
    "no near field": ("a.jsonl", b'{"body": "x"}',
                      "has no field 'text'; fields: body; set data.text_field to one of them"),
    "no fields": ("a.jsonl", b"{}", "has no field 'text'; fields: none"),
    "not text": ("a.jsonl", b'{"text": ["x"]}', "field 'text' holds list, not text; set data.text_field"),
    "lone surrogate": ("a.jsonl", (GOOD + '{"text": "\\ud800"}').encode(), "a.jsonl#2 is not valid Unicode"),
    "no gzip": ("a.jsonl.gz", b"text", "is damaged (Not a gzipped file"),
    "cut gzip": ("a.txt.gz", gzip.compress(b"text" * 99)[:-9], "is damaged (Compressed file ended before"),
    "no zstd": ("a.jsonl.zst", b"text", "is damaged (ZSTD decompress failed"),
    "cut zstd": ("a.txt.zst", pyarrow.compress(b"text" * 99, "zstd", asbytes=True)[:-9], "is damaged (Truncated"),
    "cut bzip2": ("a.txt.bz2", bz2.compress(b"text" * 99)[:-9], "is damaged (Compressed file ended before"),
    "no bzip2": ("a.jsonl.bz2", b"text", "is damaged (Invalid data stream"),
    "no xz": ("a.jsonl.xz", b"text", "is damaged (Input format not supported"),
    "no parquet": ("a.parquet", b"text", "is damaged (Parquet file size is 4 bytes"),
    "compressed parquet": ("a.parquet.gz", b"", "is compressed as a whole (.gz)"),
    "no Arrow": ("a.arrow", b"text and more text", "is damaged ("),
    "rows of several widths": ("a.csv", b"text,n\nx,1\ny,2,3\n", "CSV parse error: Row #3: Expected 2 columns, got 3"),
    "CSV not UTF-8": ("a.csv", b"text,n\n\xff,1\n", "Row #2: CSV conversion error to string: invalid UTF8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_the_place_and_a_way_out(tmp_path, case):
    name, raw, says = BAD_FILES[case]
    (tmp_path / name).write_bytes(raw)
    message = sentence(path=str(tmp_path / name))
    assert says in message
    assert name in message


@pytest.mark.parametrize(("rows", "says"), [([{"txt": "x", "n": 1}], "row 0 has no field 'text'; fields: txt, n; did"),
                                            ([{"text": 1}], "row 0: field 'text' holds int, not text"),
                                            ([{"text": b"x"}], "row 0: field 'text' holds bytes, not text")])
def test_parquet_without_the_text_names_its_columns(tmp_path, rows, says):
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    assert says in sentence(path=str(tmp_path / "a.parquet"))


def test_a_path_that_is_not_there_names_the_nearest(tmp_path):
    (tmp_path / "stories.txt").write_text("x")
    assert f"did you mean {tmp_path / 'stories.txt'}?" in sentence(path=str(tmp_path / "storis.txt"))
    assert "does not exist; name a file, a folder or a glob" in sentence(path=str(tmp_path / "zzz"))
    assert f"nor does {tmp_path / 'no'}" in sentence(path=str(tmp_path / "no" / "x.txt"))


def test_folders_and_globs_without_text_say_what_they_hold(tmp_path):
    assert "(it is empty); name the files, or give a glob" in sentence(path=str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "folder.txt").mkdir()
    assert "(it holds 1 .png)" in sentence(path=str(tmp_path))
    assert "matches no file; check the pattern" in sentence(path=str(tmp_path / "*.txt"))


def test_the_second_of_two_paths_is_checked_too(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert "b.txt does not exist" in sentence(path=(str(tmp_path / "a.txt"), str(tmp_path / "b.txt")))


# datasets

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("content", "more", "says"), [
    (GOOD, {"split": "test"}, "split"),
    (GOOD, {"dataset_config": "english"}, "'english' not found"),
    (GOOD, {"text_field": "txt"}, "row 0 has no field 'txt'; fields: text; did you mean 'text'"),
    ('{"text": 1}\n', {}, "row 0: field 'text' holds int, not text"),
    (GOOD + '{"text": \n', {}, "cannot be read (JSON parse error"),
    (None, {}, "doesn't contain any data files"),
])
def test_a_dataset_that_cannot_be_read_says_why(folder, streaming, content, more, says):
    if content is not None:
        (folder / "train.jsonl").write_text(content)
    message = sentence(dataset=str(folder), streaming=streaming, **more)
    assert says in message
    assert str(folder) in message


def test_a_dataset_that_is_out_of_reach_points_to_local_files(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'some/name' on the Hub\n(OfflineModeIsEnabled)")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = sentence(dataset="some/name")
    assert "some/name cannot be read (Couldn't reach 'some/name' on the Hub (OfflineModeIsEnabled))" in message
    assert message.endswith("or use data.path")


# Anything at all

def ending(work):
    """What work() returns, or the sentence of the UserError it ends in; any other exception goes through."""
    try:
        return work(), None
    except UserError as error:
        return None, str(error)


def is_one_sentence(message):
    return message is None or ("\n" not in message and len(message) < 600)


lines = st.lists(st.binary(max_size=20) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "x"]), inner, max_size=2),
    max_leaves=5).map(lambda value: json.dumps(value).encode()), max_size=4).map(b"\n".join)


@given(st.sampled_from(["a.txt", "a.jsonl", "a.json", "a.csv", "a.txt.gz", "a.jsonl.gz", "a.parquet", "a.arrow",
                         "a.jsonl.zst", "a.json.xz", "a.txt.bz2"]), st.binary(max_size=40) | lines,
       st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_any_kind_of_file_are_text_or_a_user_error(tmp_path, name, raw, compress):
    (tmp_path / name).write_bytes(gzip.compress(raw) if compress and name.endswith("gz") else raw)
    _, message = ending(lambda: load_corpus(DataConfig(path=str(tmp_path / name))))
    assert is_one_sentence(message)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good parquet file and a good tokenizer.json, to be damaged."""
    folder = tmp_path_factory.mktemp("whole")
    datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(200)]).to_parquet(str(folder / "a.parquet"))
    (folder / "a.txt").write_text("the quick brown fox\n" * 99)
    text = prepare(DataConfig(path=str(folder / "a.txt"), vocab_size=270, length=4, cache_dir=str(folder / "cache")))
    (folder / "t.json").write_text(text.tokenizer.json(), encoding="utf-8")
    return folder


def damaged(raw, data):
    if data.draw(st.booleans()):
        return raw[: data.draw(st.integers(0, len(raw) - 1))]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw = raw[:place] + data.draw(st.binary(max_size=3)) + raw[place + data.draw(st.integers(0, 3)):]
    return raw


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_parquet_is_read_or_a_user_error(tmp_path, whole, data):
    (tmp_path / "a.parquet").write_bytes(damaged((whole / "a.parquet").read_bytes(), data))
    _, message = ending(lambda: load_corpus(DataConfig(path=str(tmp_path / "a.parquet"))))
    assert is_one_sentence(message)


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_tokenizer_json_is_used_without_loss_or_a_user_error(tmp_path, whole, data):
    (tmp_path / "t.json").write_bytes(damaged((whole / "t.json").read_bytes(), data))
    config = DataConfig(path=str(whole / "a.txt"), tokenizer=str(tmp_path / "t.json"), length=4,
                        cache_dir=str(tmp_path / "cache"))
    text, message = ending(lambda: prepare(config))
    assert is_one_sentence(message)
    assert text is None or "the quick brown fox\n" * 2 in text.tokenizer.decode(text.train.tokens.tolist())


def test_an_empty_tokenizer_file_is_not_taken_for_none_though_the_text_is_cached(tmp_path):
    for part in range(4):
        (tmp_path / f"{part}.txt").write_text(f"a text of its own, number {part}\n" * 30)
    (tmp_path / "tokenizer.json").write_text("")
    data = {"path": (f"{tmp_path}/*.txt",), "cache_dir": str(tmp_path / "cache"), "vocab_size": 300, "length": 4,
            "heldout": 0.3}
    prepare(DataConfig(**data))
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        prepare(DataConfig(**data, tokenizer=str(tmp_path / "tokenizer.json")))
