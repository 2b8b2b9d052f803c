"""Contents of a tokenizer's folder beside its tokenizer.json: special tokens by their roles, and the chat template.

A run keeps the tokenizer.json alone; `looped import` notes the rest in the run's stamp, and `looped export` writes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from looped.data.tokenizer_files import DECLARATIONS, MARK, content_of
from looped.errors import UserError, one_line
from looped.training.runs import Run, read_stamp

ROLES = ("bos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""The roles of single tokens; the end of text is the run's own."""
MORE = ("extra_special_tokens", "additional_special_tokens")
"""Names of the list of further special tokens, in transformers 5 and before."""
TEMPLATE = "chat_template.jinja"


def declared(folder: Path) -> dict[str, Any]:
    """The special tokens, by role, and the chat template that files in a tokenizer's folder declare."""
    said: dict[str, Any] = {}
    for name in reversed(DECLARATIONS):
        said |= {key: value for key, value in _fields(folder / name).items() if value is not None}
    found: dict[str, Any] = {role: content_of(said.get(role)) for role in ROLES}
    found["more"] = [content_of(token) for name in MORE for token in _values(said.get(name))]
    template = said.get("chat_template")
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    return found | {"chat_template": template if isinstance(template, str) else None}


def ends_in(folder: Path, raw: Mapping[str, Any]) -> list[int]:
    """The ids at which a model of transformers stops, by its config (`raw`) and its generation_config.json."""
    generation = _fields(folder / "generation_config.json")
    said = [number for each in (raw, generation) for number in _values(each.get("eos_token_id"))]
    return [number for number in said if isinstance(number, int)]


def tokens_of(run: Run) -> dict[str, Any]:
    """Config entries for the begin, end and padding tokens of texts: the donor's for an imported run; of several ends,
    the first is the run's own."""
    imported, words = read_stamp(run.path).get("imported", {}), run.tokenizer
    raw: Mapping[str, Any] = imported.get("config", {})
    ends = list(dict.fromkeys(number for number in (words.end_of_text, *imported.get("ends", ()))
                              if 0 <= number < words.vocab_size))
    padding = raw.get("pad_token_id")
    if padding is None or not 0 <= padding < words.vocab_size:
        padding = words.token_id(imported.get("tokenizer", {}).get("pad_token"))
    return {"bos_token_id": raw.get("bos_token_id", words.end_of_text),
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": words.end_of_text if padding is None else padding}


def write_tokenizer(run: Run, folder: Path) -> None:
    """Writes the run's tokenizer for transformers, with what the donor's folder said of an imported one; its
    tokenizer.json is kept verbatim, except for our mark."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fields, words = json.loads(run.tokenizer.json()), run.tokenizer
    for token in fields["added_tokens"]:
        token.pop(MARK, None)
    content = json.dumps(fields, ensure_ascii=False)
    said = read_stamp(run.path).get("imported", {}).get("tokenizer", {"bos_token": words.end_token})
    roles = {role: said.get(role) for role in ROLES if words.token_id(said.get(role)) is not None}
    roles = {"pad_token": words.end_token} | roles | {"eos_token": words.end_token}
    more = [token for token in said.get("more", ()) if words.token_id(token) is not None]
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content), **roles, extra_special_tokens=more,
                            chat_template=said.get("chat_template"), padding_side="left",
                            clean_up_tokenization_spaces=False).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8", newline="")


def _fields(file: Path) -> dict[str, Any]:
    """The content of a JSON file, none if there is no such file. Raises UserError for a broken one."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not what save_pretrained writes ({one_line(error)}); restore it or remove it"
                        ) from None


def _values(given: Any) -> list[Any]:
    """The values of a list, of a mapping, or one value alone."""
    given = list(given.values()) if isinstance(given, dict) else given
    return given if isinstance(given, list) else [] if given is None else [given]
