"""Folders and globs: shards of all kinds in one folder, links, and a notice of all that is not read."""

import glob
import gzip
import json
import os
import re
import warnings

import pyarrow
import pytest

from looped.config.data import DataConfig
from looped.data.corpus import load_corpus
from looped.data.text_sources import DatasetSource, FileSource
from looped.errors import UserError

datasets = pytest.importorskip("datasets")


def write(path, content="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def load(path, **more):
    """({name: text}, notices)."""
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        corpus = load_corpus(DataConfig(path=path if isinstance(path, tuple) else str(path), **more))
    return ({document.name: document.text for document in corpus.documents},
            [str(notice.message) for notice in notices])


def shard(name):
    return json.dumps({"text": f"of {name}"}).encode() + b"\n"


def test_shards_of_every_kind_in_one_folder_are_read(tmp_path):
    pack = {".gz": gzip.compress, ".zst": lambda raw: pyarrow.compress(raw, "zstd", asbytes=True), "": bytes}
    for stem, compression in [("c4-train.00000.json", ".gz"), ("b.json", ".zst"), ("c.jsonl", ".gz"),
                              ("d.jsonl", ".zst"), ("one.jsonl", ""), ("e.json", "")]:
        write(tmp_path / f"{stem}{compression}", pack[compression](shard(stem)))
    for stem, compression in [("f.txt", ".gz"), ("g.txt", ".zst"), ("h.txt", "")]:
        write(tmp_path / f"{stem}{compression}", pack[compression](f"of {stem}".encode()))
    datasets.Dataset.from_list([{"text": "of i.parquet"}]).to_parquet(str(tmp_path / "i.parquet"))
    texts, notices = load(tmp_path)
    assert sorted(texts.values()) == [f"of {name}" for name in (
        "b.json", "c.jsonl", "c4-train.00000.json", "d.jsonl", "e.json", "f.txt", "g.txt", "h.txt", "i.parquet",
        "one.jsonl")]
    assert notices == []


def test_what_a_folder_search_passes_over_is_counted_once(tmp_path):
    for name in ("a.txt", "b.png", "c.PNG", "d.pdf", ".hidden", ".git/config", "__pycache__/a.pyc", "deep/e.bin.gz"):
        write(tmp_path / name)
    write(tmp_path / "package.json", '{\n "name": "x"\n}')
    write(tmp_path / "tsconfig.json", "{\n // a comment\n}")
    texts, notices = load(tmp_path)
    assert list(texts) == ["a.txt"]
    (notice,) = notices
    assert notice.startswith(f"data.path {tmp_path}: skipped 3 hidden, 2 .png, 2 .json without rows with a field '")
    assert "1 .pdf" in notice
    assert "1 .bin.gz" in notice


def test_folders_of_runs_are_passed_over_unless_they_are_the_entry(tmp_path):
    for name in ("a.txt", "runs/b.txt", "runs/one/config.yaml", "runs/one/deep/c.txt", "runs/two/config.yaml"):
        write(tmp_path / name)
    assert list(load(tmp_path)[0]) == ["a.txt", "runs/b.txt", "runs/one/config.yaml", "runs/one/deep/c.txt",
                                       "runs/two/config.yaml"]
    for name in ("one", "two"):
        write(tmp_path / "runs" / name / "stamp.json")
    texts, (notice,) = load(tmp_path)
    assert list(texts) == ["a.txt", "runs/b.txt"]
    assert "skipped 2 folders of runs; to read them too" in notice
    assert list(load(tmp_path / "**" / "*.txt")[0]) == ["a.txt", "runs/b.txt"]
    assert "deep/c.txt" in load(tmp_path / "runs" / "one")[0]


def test_a_folder_of_json_alone_says_what_fields_its_rows_have(tmp_path):
    write(tmp_path / "b.json", '[{"story": "x"}]')
    write(tmp_path / "c.json", '[{"story": "y"}]')
    assert load(tmp_path, text_field="story")[0] == {"b.json#0": "x", "c.json#0": "y"}
    with pytest.raises(UserError, match=r"b.json row 0 has no field 'stroy'; fields: story; did you mean 'story'"):
        load(tmp_path, text_field="stroy")


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.txt.zst", "b.json.gz", "b.parquet"])
def test_a_damaged_file_in_the_middle_of_a_folder_is_not_passed_over(tmp_path, name):
    for other in ("a.txt", "c.txt"):
        write(tmp_path / other)
    write(tmp_path / name, b"not what its suffix says, but long enough to look at")
    with pytest.raises(UserError, match=rf"{re.escape(name)} is damaged .*; restore it or leave it out of data.path"):
        load(tmp_path)


# Links

def test_links_to_folders_are_followed_and_cycles_are_not(tmp_path):
    write(tmp_path / "far" / "shards" / "a.txt", "far")
    write(tmp_path / "near" / "b.txt", "near")
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "near" / "again").symlink_to(tmp_path / "far" / "shards")
    (tmp_path / "near" / "self").symlink_to(tmp_path / "near")
    (tmp_path / "near" / "up").symlink_to(tmp_path)
    (tmp_path / "far" / "back").symlink_to(tmp_path / "near")
    texts, notices = load(tmp_path / "near")
    assert sorted(texts.values()) == ["far", "near"]
    (notice,) = notices
    assert "skipped 1 links to a folder that contains them" in notice  # which is up, not self


@pytest.mark.parametrize("pattern", ["**/*.txt", "**", "*/**/*.txt", "**/sub/*", "**/sub/**", "**/s*/**/*.txt"])
def test_globs_go_through_links_as_folders_do(tmp_path, pattern):
    write(tmp_path / "near" / "[a]" / "sub" / "b.txt", "near")
    write(tmp_path / "far" / "sub" / "c.txt", "far")
    (tmp_path / "near" / "far").symlink_to(tmp_path / "far")
    expected = {os.path.realpath(path) for path in glob.glob(f"{tmp_path}/near/{pattern}", recursive=True)
                if os.path.isfile(path)}
    for name in ("one", "two", "three"):  # with which the glob module would have 3 ** 40 paths to go
        (tmp_path / "near" / name).symlink_to(tmp_path / "near")
    source = FileSource((f"{tmp_path}/near/{pattern}",), field="text", limit=100)
    assert {str(path.resolve()) for _, path in source.files} == expected
    assert [name.split("/")[0] for name, _ in source.files] == sorted(
        "far" if "far" in path else "[a]" for path in expected)


def test_a_folder_keeps_its_name_though_a_link_to_it_comes_first(tmp_path):
    write(tmp_path / "z" / "a.txt")
    (tmp_path / "link").symlink_to(tmp_path / "z")
    assert list(load(tmp_path)[0]) == ["z/a.txt"]


def test_two_names_of_one_file_are_one_document(tmp_path):
    write(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    assert list(load(tmp_path)[0]) == ["a.txt"]
    assert list(load((str(tmp_path / "b.txt"), str(tmp_path)))[0]) == ["b.txt"]


def test_a_folder_within_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "a.txt")
    write(tmp_path / "closed" / "b.txt")
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot read the folder .*closed: Permission denied; check its permissions"):
        load(tmp_path)


def test_a_pipe_in_a_folder_is_passed_over_and_a_broken_link_is_not(tmp_path):
    write(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    texts, (notice,) = load(tmp_path)
    assert list(texts) == ["a.txt"]
    assert "skipped 1 pipe or device" in notice
    (tmp_path / "c.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"cannot read .*c.txt: No such file"):
        load(tmp_path)


# What is cut off

def test_a_cut_names_what_is_kept_and_what_is_left_out(tmp_path):
    for name in "abcde":
        write(tmp_path / f"{name}.txt", "0123456789")
    texts, (notice,) = load(tmp_path, max_bytes=25)
    assert list(texts.values()) == ["0123456789", "0123456789", "01234"]
    assert notice == (
        "data.max_bytes 25 cuts the text off in c.txt, its document 3 in reading order; of 5 files found (50 bytes on "
        "disk), 2 are not read")


@pytest.mark.parametrize(("content", "max_bytes", "cut"), [
    ("0123456789", 9, True), ("0123456789", 10, False), ("naïve", 3, True), ("naï", 4, False), ("naïx", 4, True)])
def test_a_cut_within_the_only_file_is_known(tmp_path, content, max_bytes, cut):
    write(tmp_path / "a.txt", content)
    texts, notices = load(tmp_path / "a.txt", max_bytes=max_bytes)
    assert len(notices) == cut
    assert all(f"({len(content.encode())} bytes on disk), the last is read in part" in notice for notice in notices)
    assert texts["a.txt"] == content.encode()[:max_bytes].decode(errors="ignore")


def test_a_cut_at_the_end_of_all_files_is_none(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.txt", "0123456789")
    assert load(tmp_path, max_bytes=30)[1] == []
    assert len(load(tmp_path, max_bytes=20)[1]) == 1


def test_a_cut_of_a_dataset_says_of_how_many_rows(monkeypatch):
    rows = datasets.Dataset.from_list([{"text": "0123456789"}] * 7)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    source = DatasetSource(DataConfig(dataset="some/name"))
    next(source.documents())
    assert source.extent() == "of 7 rows, the first 1 are read"
    with pytest.warns(UserWarning, match=r"train#1, its document 2 in reading order; of 7 rows, the first 2 are read"):
        load_corpus(DataConfig(dataset="some/name", max_bytes=15))


def test_the_default_text_is_whole():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_corpus(DataConfig())
