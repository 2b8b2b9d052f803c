"""The tokenizer loses nothing, is deterministic, and keeps its special token for the ends of documents."""

import os
import subprocess
import sys

import pytest
from byte_tokenizer import TEXTS, byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from looped.data import tokenizer as tokenizer_module
from looped.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from looped.errors import UserError

TOKENIZER = train_tokenizer(TEXTS, 310)


@given(st.text() | st.sampled_from([END_OF_TEXT, f"a{END_OF_TEXT}b", "\r\n \t\n  x", "\ufeff\u2028e\u0301", "\x00"]))
@settings(max_examples=300)
def test_any_text_comes_back_as_it_was(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.loss_of(text) is None


@given(st.lists(st.text() | st.just(END_OF_TEXT), max_size=6))
def test_an_end_of_text_in_the_stream_is_always_the_end_of_a_document(texts):
    encoded = list(TOKENIZER.encode_documents(texts))
    assert len(encoded) == len(texts)
    for text, ids in zip(texts, encoded, strict=True):
        assert ids.tolist() == [*TOKENIZER.encode(text), TOKENIZER.end_of_text]
        assert ids.tolist().count(TOKENIZER.end_of_text) == 1
        assert TOKENIZER.decode(ids) == text


def test_a_long_document_is_encoded_in_pieces_without_loss(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE", 7)
    texts = ["x" * 50, "one\ntwo\n\n three\n" * 9, "", "🙂" * 30]
    for text, ids in zip(texts, TOKENIZER.encode_documents(texts), strict=True):
        assert TOKENIZER.decode(ids) == text


def test_the_vocabulary_has_the_asked_size_where_the_text_supports_it():
    assert TOKENIZER.vocab_size == 310
    assert train_tokenizer(TEXTS, 100_000).vocab_size < 1000
    assert max(TOKENIZER.encode(" ".join(TEXTS))) < TOKENIZER.vocab_size


def test_merges_shorten_text_like_the_training_text():
    assert len(TOKENIZER.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


def test_training_is_the_same_in_another_process_with_other_threads():
    code = ("from looped.data.tokenizer import train_tokenizer\n"
            f"print(train_tokenizer({TEXTS!r}, 310).json())")
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONHASHSEED": "7"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert printed.decode().strip() == TOKENIZER.json().strip()


def save(backend, path):
    backend.save(str(path))
    return path


def test_a_saved_tokenizer_loads_to_the_same_one(tmp_path):
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.json(), encoding="utf-8")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.json() == TOKENIZER.json()
    assert (loaded.vocab_size, loaded.end_of_text) == (TOKENIZER.vocab_size, TOKENIZER.end_of_text)


def test_a_loaded_tokenizer_keeps_its_own_end_of_text(tmp_path):
    loaded = load_tokenizer(save(byte_level(["<pad>", "</s>"]), tmp_path / "t.json"))
    assert (loaded.end_of_text, loaded.vocab_size) == (1, 300)


def test_a_loaded_tokenizer_without_an_end_of_text_gets_one_more_token(tmp_path):
    with pytest.warns(UserWarning, match=r"t.json has no end-of-text token: .* of 300 .*; <\|endoftext\|> is added"):
        loaded = load_tokenizer(save(byte_level([]), tmp_path / "t.json"))
    assert (loaded.end_of_text, loaded.vocab_size) == (300, 301)


def test_truncation_and_padding_of_a_loaded_tokenizer_are_switched_off(tmp_path):
    backend = byte_level(["</s>"])
    backend.enable_truncation(5)
    backend.enable_padding(length=64, pad_id=0, pad_token="</s>")
    loaded = load_tokenizer(save(backend, tmp_path / "t.json"))
    assert loaded.loss_of(TEXTS[0]) is None
    assert len(loaded.encode("a")) == 1


def lowercased():
    backend = byte_level(["</s>"])
    backend.normalizer = normalizers.Lowercase()
    return backend


def test_a_tokenizer_that_composes_letters_is_taken_and_a_text_of_decomposed_ones_is_told(tmp_path):
    """As Qwen's, by Unicode's NFC."""
    backend = byte_level(["</s>"])
    backend.normalizer = normalizers.NFC()
    backend.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.loss_of("na\u00efve") is None
    assert "comes back as" in tokenizer.loss_of("nai\u0308ve")


def words():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "</s>": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


@pytest.mark.parametrize("make", [lowercased, words])
def test_a_tokenizer_that_loses_text_is_refused_with_an_example(tmp_path, make):
    with pytest.raises(UserError, match=r"does not decode what it encodes \(.* comes back as .*use a byte-level one"):
        load_tokenizer(save(make(), tmp_path / "t.json"))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 10_000])
def test_what_is_no_tokenizer_json_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "t.json")


def test_a_missing_tokenizer_file_names_the_setting(tmp_path):
    with pytest.raises(UserError, match=r"data\.tokenizer .*cannot be read"):
        load_tokenizer(tmp_path / "none.json")
