"""Files as people have them: every format and compression gives the same documents; a big file is not read whole."""

import bz2
import gzip
import io
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looped.config.data import DataConfig
from looped.data.corpus import load_corpus
from looped.data.json_rows import json_rows
from looped.errors import UserError

datasets = pytest.importorskip("datasets")
TEXTS = ["naïve 🙂", "two\nlines\r\n", 'a "quoted", text', "\u2028\x85\x0c\ufeff", " NA ", "null"]
ROWS = [{"id": number, "meta": {"text": text, "n": number}, "text": text} for number, text in enumerate(TEXTS)]
COMPRESSED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
              ".zst": lambda raw: pyarrow.compress(raw, "zstd", asbytes=True)}


def texts_of(path, **more):
    return [document.text for document in load_corpus(DataConfig(path=str(path), **more)).documents]


FORMS = {
    "lines": (".jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
    "lines that end in CR LF, some of them blank": (".jsonl", "\r\n\r\n".join(map(json.dumps, ROWS)) + "\r\n \r\n"),
    "lines of characters as they are": (".ndjson", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
    "an array": (".json", json.dumps(ROWS)),
    "an array over lines": (".json", json.dumps(ROWS, indent=2)),
    "an array called lines": (".jsonl", " \n\n" + json.dumps(ROWS)),
    "objects over lines": (".json", "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in ROWS)),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("form", FORMS)
def test_json_of_every_form_gives_its_texts_as_they_are(tmp_path, form, mark):
    suffix, content = FORMS[form]
    (tmp_path / f"a{suffix}").write_bytes((mark + content).encode())
    assert texts_of(tmp_path / f"a{suffix}") == TEXTS
    assert texts_of(tmp_path / f"a{suffix}", text_field="meta.text") == TEXTS


def test_a_single_object_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "x"}')
    (tmp_path / "b.json").write_text('{\n "text":\n  "y"\n}\n')
    assert texts_of(tmp_path / "*.json") == ["x", "y"]


def test_an_empty_array_holds_no_text(tmp_path):
    (tmp_path / "a.json").write_text("[ \n]")
    with pytest.raises(UserError, match="holds no text"):
        texts_of(tmp_path / "a.json")


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_every_compression_gives_what_was_compressed(tmp_path, suffix, compression):
    plain = {".txt": TEXTS[0], ".jsonl": FORMS["lines"][1], ".json": FORMS["an array"][1], ".csv": "text\nnaïve 🙂\n"}
    (tmp_path / f"a{suffix}{compression}").write_bytes(COMPRESSED[compression](plain[suffix].encode()))
    assert texts_of(tmp_path / f"a{suffix}{compression}") == (TEXTS if "json" in suffix else TEXTS[:1])
    assert texts_of(tmp_path) == (TEXTS if "json" in suffix else TEXTS[:1])


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_parts_that_were_compressed_one_by_one_are_read_to_the_end(tmp_path, compression):
    parts = [COMPRESSED[compression](json.dumps(row).encode() + b"\n") for row in ROWS]
    (tmp_path / f"a.jsonl{compression}").write_bytes(b"".join(parts))
    assert texts_of(tmp_path / f"a.jsonl{compression}") == TEXTS


def test_a_byte_order_mark_at_the_start_of_a_text_is_no_part_of_it(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\ufeff\r\n".encode())
    assert texts_of(tmp_path / "a.txt") == ["one\ufeff\r\n"]


@pytest.mark.parametrize("field", ["text", "meta.text"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_and_fields_of_structs_are_read(tmp_path, suffix, field):
    table = pyarrow.Table.from_pylist(ROWS)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    assert texts_of(tmp_path / f"a{suffix}", text_field=field) == TEXTS
    with pytest.raises(UserError, match=r"row 0 has no field 'meta.txt'; fields: meta.text, meta.n; did you mean"):
        texts_of(tmp_path / f"a{suffix}", text_field="meta.txt")


@pytest.mark.parametrize("row", [{"a.b": "own", "a": {"b": "inner"}}, {"a": {"b": "own"}, "b": "x"}])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_field_with_a_dot_in_its_own_name_goes_before_one_within_another(tmp_path, suffix, row):
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert texts_of(tmp_path / f"a{suffix}", text_field="a.b") == ["own"]


def test_fields_nest_to_any_depth_and_null_on_the_way_is_no_text(tmp_path):
    rows = [{"a.b": {"c": {"d.e": "x"}}}, {"a.b": None}, {"a.b": {"c": {"d.e": None}}}, {"a.b": {"c": {"d.e": "y"}}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts_of(tmp_path / "a.jsonl", text_field="a.b.c.d.e") == ["x", "y"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_field_within_a_field_of_a_dataset_is_read(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(FORMS["lines"][1])
    corpus = load_corpus(DataConfig(dataset=str(tmp_path / "data"), streaming=streaming, text_field="meta.text"))
    assert [document.text for document in corpus.documents] == TEXTS


def test_a_folder_that_save_to_disk_wrote_is_read(tmp_path):
    parts = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in ("train", "test")})
    parts.save_to_disk(str(tmp_path / "both"))
    (tmp_path / "both" / "train" / "cache-0123.arrow").write_bytes(b"what map() leaves beside it")
    assert texts_of(tmp_path / "both" / "train") == TEXTS
    assert sorted(texts_of(tmp_path / "both")) == sorted(TEXTS * 2)


# Tables of text

def test_a_table_with_the_column_gives_a_document_a_row(tmp_path):
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    (tmp_path / "a.csv").write_bytes(("\ufeffid,text\r\n" + "".join(f"1,{text}\r\n" for text in quoted)).encode())
    (tmp_path / "b.tsv").write_bytes(("id\ttext\n" + "".join(f"1\t{text}\n" for text in quoted)).encode())
    assert texts_of(tmp_path / "a.csv") == TEXTS
    assert texts_of(tmp_path / "b.tsv") == TEXTS


def test_a_table_without_the_column_is_plain_text_and_says_so(tmp_path):
    (tmp_path / "a.csv").write_text("id,body\n1,x\n")
    with pytest.warns(UserWarning, match=r"without a column 'text': 1, such as a.csv \(columns: id, body\)"):
        assert texts_of(tmp_path / "a.csv") == ["id,body\n1,x\n"]


# Memory

class Counted(io.BufferedReader):
    """A file that counts the bytes it gives."""

    given = 0

    def read(self, size=-1):
        raw = super().read(size)
        Counted.given += len(raw)
        return raw

    def readline(self, size=-1):
        raw = super().readline(size)
        Counted.given += len(raw)
        return raw


@pytest.mark.parametrize("content", ["[" + ",".join(["{\"text\": \"" + "x" * 1000 + "\"}"] * 4000) + "]",
                                     ("{\n\"text\":\n\"" + "x" * 1000 + "\"}\n") * 4000])
def test_of_an_array_or_of_objects_no_more_is_read_than_is_wanted(tmp_path, monkeypatch, content):
    (tmp_path / "a.json").write_text(content)
    monkeypatch.setattr("looped.data.json_rows.open_bytes", lambda path: Counted(path.open("rb", buffering=0)))
    Counted.given = 0
    texts_of(tmp_path / "a.json", max_bytes=10_000)
    assert 10_000 < Counted.given < 200_000
    texts_of(tmp_path / "a.json")
    assert Counted.given > len(content)  # the positive control: the count sees what is read


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 16])
def test_values_are_the_same_however_the_file_is_cut_into_pieces(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("looped.data.json_rows.PIECE", piece)
    values = [1, -2.5e10, "a\\u00e9\"\n", True, None, 10.0, 1e-7, {"x": [1, {"y": "🙂"}]}, [], {}, "😀", 12345678]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=1))
    assert [value for _, _, value in json_rows(tmp_path / "a.json")] == values


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                      max_leaves=8)


@given(st.lists(values, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_any_array_is_read_as_the_json_module_reads_it(tmp_path_factory, rows, indent, ascii_only, piece):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("looped.data.json_rows.PIECE", piece)
        assert [value for _, _, value in json_rows(path)] == json.loads(path.read_bytes())
