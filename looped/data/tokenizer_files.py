"""Reading of tokenizer files: a tokenizer.json of the `tokenizers` library, a folder that `save_pretrained` wrote, or
the name of a repository of the Hugging Face hub.

The end-of-text token is the `eos_token` declared in the files next to it, else the first of a few known names. A
declared one is marked in the content of the tokenizer.json, by a field of its entry that `tokenizers` ignores, so that
a copy of this one file is enough.
"""

import json
import pkgutil
import warnings
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from looped.data.compressed_files import Utf8
from looped.data.tokenizer_hub import fetched, is_name
from looped.errors import UserError, one_line

TOKENIZER = "tokenizer.json"
DECLARATIONS = ("tokenizer_config.json", "special_tokens_map.json")
END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
CONVERTER = "looped.hub.tokenizer_conversion:tokenizer_json"
"""Resolved by name, because looped.data must not import looped.hub or transformers."""

MARK = "end_of_text"
WAY_OUT = "name a tokenizer.json or a folder with one, or leave it null to train one"


def read_tokenizer_file(path: str | Path, end: int | None = None) -> str:
    """The content of the tokenizer.json that `data.tokenizer` names: the file, its folder, or its repository on the
    hub. The end-of-text token declared next to it is marked, if another one would be used otherwise. Raises
    `UserError`.

    end: id of the end-of-text token if no file next to it declares one. A tokenizer without an end-of-text token gets
    one, with a warning.
    """
    name, path = str(path), Path(path).expanduser()
    if not path.exists() and is_name(name):
        path = fetched(name)
    file = path / TOKENIZER if path.is_dir() else path
    content = _convert(path) if path.is_dir() and not file.is_file() else _read(file)
    if marked_end(content):
        return content
    declared = _declared_end(file.parent)
    if declared is None and end is None:
        _note_missing_end(content, path)
        return content
    backend = parse_backend(content, path)
    token = backend.id_to_token(end) if declared is None else declared
    if token is None:
        raise UserError(f"data.tokenizer {path} has no token {end}, the model's end of text; give the tokenizer that "
                        f"belongs to the model")
    if token == known_end(backend):
        return content
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])  # adds nothing if it is one already
    return mark_end(backend.to_str(), token)


def _note_missing_end(content: str, path: Path) -> None:
    if any(f'"{token}"' in content for token in KNOWN_ENDS):  # cheaper than parsing megabytes
        return
    size = parse_backend(content, path).get_vocab_size(with_added_tokens=True)
    warnings.warn(f"data.tokenizer {path} has no end-of-text token: neither {' nor '.join(DECLARATIONS)} next to it "
                  f"has an eos_token, nor does its vocabulary of {size:,} have one of {', '.join(KNOWN_ENDS)}; "
                  f"{END_OF_TEXT} is added to it", stacklevel=3)


def parse_backend(content: str, path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json's content. Raises `UserError`."""
    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # the Rust library raises plain Exception, also for panics
        raise _not_a_tokenizer(path, one_line(error)) from None


def known_end(backend: Tokenizer) -> str | None:
    """The first known name of an end-of-text token that is in the vocabulary."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return next((token for token in KNOWN_ENDS if token in vocabulary), None)


def mark_end(content: str, end: str) -> str:
    """The content of a tokenizer.json with the added token `end` marked as the end-of-text token."""
    fields = json.loads(content)
    for token in fields["added_tokens"]:
        if token["content"] == end:
            token[MARK] = True
    return json.dumps(fields, ensure_ascii=False)


def marked_end(content: str) -> str | None:
    """The token that `mark_end` has marked, if any."""
    if f'"{MARK}"' not in content:
        return None
    tokens = json.loads(content).get("added_tokens", [])
    return next((token["content"] for token in tokens if token.get(MARK) is True), None)


def _read(file: Path) -> str:
    try:
        return Utf8(file).decode(file.read_bytes(), final=True)
    except OSError as error:
        raise UserError(f"data.tokenizer {file} cannot be read ({error.strerror}); {WAY_OUT}") from None
    except UserError:
        raise _not_a_tokenizer(file, "not UTF-8 text") from None


def _convert(folder: Path) -> str:
    """The content of a tokenizer.json converted from a folder with another tokenizer format. Raises `UserError`."""
    return pkgutil.resolve_name(CONVERTER)(folder)


def _declared_end(folder: Path) -> str | None:
    """The first `eos_token` declared in the files next to a tokenizer.json. Raises `UserError` for broken files."""
    for file in (folder / name for name in DECLARATIONS):
        if not file.is_file():
            continue
        try:
            end = content_of(json.loads(_read(file)).get("eos_token"))
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} is not what save_pretrained writes ({one_line(error)}), but it declares the "
                            f"end-of-text token; restore it or remove it") from None
        if end:
            return end
    return None


def content_of(token: Any) -> str | None:
    """The text of a token, given as a string or as a mapping with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _not_a_tokenizer(path: str | Path, problem: str) -> UserError:
    return UserError(f"data.tokenizer {path} is not a tokenizer.json ({problem}); "
                     f"name one that `tokenizers` saved, or leave it null to train one")
