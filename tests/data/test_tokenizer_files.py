"""Tokenizers as transformers saves them: folders, declared ends of text, and forms that have to be converted."""

import builtins
import json
import warnings

import pytest
from byte_tokenizer import TEXTS, byte_level
from one_sentence import sentence_of
from tokenizers import Tokenizer

from looped.config.data import DataConfig
from looped.data.text import prepare
from looped.data.tokenizer import END_OF_TEXT, load_tokenizer, parse_tokenizer
from looped.errors import UserError


def saved(folder, special_tokens, **declared):
    """A tokenizer.json, and files beside it by name."""
    folder.mkdir(exist_ok=True)
    byte_level(special_tokens).save(str(folder / "tokenizer.json"))
    for name, content in declared.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def load(path):
    """The tokenizer, which must be had without a notice."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_tokenizer(path)


DECLARED = [{"tokenizer_config": {"eos_token": "<|end|>"}}, {"special_tokens_map": {"eos_token": "<|end|>"}},
            {"special_tokens_map": {"eos_token": {"content": "<|end|>", "lstrip": False}}},
            {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<|end|>"}}]


@pytest.mark.parametrize("declared", DECLARED)
@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_declared_end_of_text_is_taken(tmp_path, named, declared):
    folder = saved(tmp_path / "t", ["<|pad|>", "<|end|>"], **declared)
    loaded = load(folder if named == "folder" else folder / "tokenizer.json")
    assert (loaded.end_of_text, loaded.vocab_size) == (1, 300)
    assert loaded.encode("<|end|>") != [1]  # a text that spells it out does not end there


def test_a_declared_end_of_text_goes_before_one_of_a_known_name(tmp_path):
    folder = saved(tmp_path / "t", [END_OF_TEXT, "<|im_end|>"], tokenizer_config={"eos_token": "<|im_end|>"})
    assert load(folder).end_of_text == 1
    (folder / "tokenizer_config.json").unlink()
    assert load(folder).end_of_text == 0  # the positive control


def test_the_content_alone_says_which_token_ends_a_text(tmp_path):
    folder = saved(tmp_path / "t", [END_OF_TEXT, "<|im_end|>"], tokenizer_config={"eos_token": "<|im_end|>"})
    loaded = load(folder)
    again = parse_tokenizer(loaded.json(), "a copy")
    assert (again.end_of_text, again.json()) == (1, loaded.json())
    assert Tokenizer.from_str(loaded.json()).encode("fox").ids == loaded.encode("fox")  # others read it too


def test_a_declared_token_that_the_vocabulary_lacks_is_added(tmp_path):
    loaded = load(saved(tmp_path / "t", [], tokenizer_config={"eos_token": "<|end|>"}))
    assert (loaded.end_of_text, loaded.vocab_size) == (300, 301)


def test_a_declaration_of_what_is_taken_anyway_changes_no_fingerprint(tmp_path):
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    folder = saved(tmp_path / "t", [END_OF_TEXT, "<|im_end|>"])
    data = DataConfig(path=str(tmp_path / "a.txt"), tokenizer=str(folder / "tokenizer.json"), length=8,
                      cache_dir=str(tmp_path / "cache"))
    before = prepare(data)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    assert prepare(data).fingerprint == before.fingerprint
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    after = prepare(data)
    assert after.fingerprint != before.fingerprint
    assert (before.train.tokens[-1], after.train.tokens[-1]) == (0, 1)


def test_a_tokenizer_that_gets_an_end_of_text_says_so_though_the_tokens_are_cached(tmp_path):
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    data = DataConfig(path=str(tmp_path / "a.txt"), tokenizer=str(saved(tmp_path / "t", ["<|pad|>"])), length=8,
                      cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"has no end-of-text token: .*<\|endoftext\|> is added to it") as said:
            assert prepare(data).tokenizer.end_of_text == 300
        assert sum("no end-of-text token" in str(each.message) for each in said) == 1


def test_a_byte_order_mark_is_no_part_of_a_tokenizer(tmp_path):
    folder = saved(tmp_path / "t", [END_OF_TEXT], tokenizer_config={"eos_token": END_OF_TEXT})
    for file in folder.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load(folder).vocab_size == 300


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_broken_declaration_is_refused(tmp_path, content):
    folder = saved(tmp_path / "t", [END_OF_TEXT])
    (folder / "tokenizer_config.json").write_text(content)
    assert "tokenizer_config.json is not what save_pretrained writes" in sentence_of(lambda: load_tokenizer(folder))


# With transformers

def test_a_folder_that_save_pretrained_wrote_gives_the_ids_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(["<|pad|>", "<|end|>"]),
                                                eos_token="<|end|>", pad_token="<|pad|>")
    fast.save_pretrained(str(tmp_path / "t"))
    loaded = load(tmp_path / "t")
    assert loaded.end_of_text == fast.eos_token_id == 1
    assert loaded.encode(TEXTS[0]) == fast(TEXTS[0])["input_ids"]


def older_form(folder):
    """vocab.json and merges.txt, as GPT-2's were saved before there was a tokenizer.json."""
    folder.mkdir()
    model = json.loads(byte_level([END_OF_TEXT]).to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return folder


def test_an_older_form_is_converted(tmp_path):
    pytest.importorskip("transformers")
    loaded = load(older_form(tmp_path / "old"))
    assert loaded.encode(TEXTS[0]) == byte_level([END_OF_TEXT]).encode(TEXTS[0]).ids
    assert loaded.loss_of(TEXTS[0]) is None


def test_an_older_form_without_transformers_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *rest, **more)
    monkeypatch.setattr(builtins, "__import__", missing)
    message = sentence_of(lambda: load_tokenizer(older_form(tmp_path / "old")))
    assert "has no tokenizer.json, and other formats need transformers to be converted; pip install" in message


@pytest.mark.parametrize("files", [{}, {"tokenizer_config.json": '{"tokenizer_class": "ByT5Tokenizer"}'}])
def test_a_folder_without_a_tokenizer_that_can_be_had_is_refused(tmp_path, files):
    pytest.importorskip("transformers")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    message = sentence_of(lambda: load_tokenizer(tmp_path))
    assert f"data.tokenizer {tmp_path} h" in message
    assert "name a folder with a tokenizer.json" in message


# Names on the hub

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The local cache of the hub, as `snapshot_download` lays it out, and no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    saved(repository / "snapshots" / ("a" * 40), [END_OF_TEXT, "<|end|>"], tokenizer_config={"eos_token": "<|end|>"})
    return repository / "snapshots"


@pytest.mark.parametrize("name", ["someone/tiny", f"someone/tiny@{'a' * 40}", "someone/tiny@main"])
def test_a_name_on_the_hub_is_read_from_the_local_cache(hub, name):
    loaded = load(name)
    assert (loaded.json(), loaded.end_of_text) == (load(hub / ("a" * 40)).json(), 1)


def test_a_tokenizer_that_is_here_is_not_asked_for_on_the_hub(hub, monkeypatch):
    import huggingface_hub

    asked, download = [], huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *names, local_files_only, **more: (
        asked.append(local_files_only) or download(*names, local_files_only=local_files_only, **more)))
    load("someone/tiny")
    assert asked == [True]
    with pytest.raises(UserError):
        load("someone/other")
    assert asked == [True, True, False]  # the control


def test_a_name_that_nothing_has_is_one_sentence_with_a_way_out(hub):
    message = sentence_of(lambda: load("someone/other"))
    assert "data.tokenizer someone/other is neither a file nor a folder here, and cannot be fetched from" in message
    assert "or leave it null to train one" in message


def test_a_path_is_no_name_on_the_hub(hub, tmp_path):
    for path in ("missing.json", str(tmp_path / "missing"), "./missing", "~/missing-tokenizer", "a/b/c"):
        assert "cannot be read (No such file or directory)" in sentence_of(lambda path=path: load(path))


def test_a_folder_here_goes_before_a_name_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    saved(tmp_path / "someone" / "tiny", [END_OF_TEXT])
    assert load("someone/tiny").end_of_text == 0


def test_a_text_is_tokenized_by_a_name_on_the_hub(hub, make):
    text = prepare(make(tokenizer="someone/tiny"))
    assert (text.tokenizer.end_token, text.vocab_size) == ("<|end|>", 300)
