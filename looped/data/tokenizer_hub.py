"""Tokenizers on the Hugging Face hub, by the name of their repository: `gpt2`, `org/name`, `org/name@revision`."""

import re
from pathlib import Path

from looped.errors import UserError, one_line

NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
FETCHED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "config.json", "vocab.*", "merges.txt",
           "*.model", "chat_template.jinja")
"""The files fetched from a repository; no code, no weights."""


def is_name(entry: str) -> bool:
    """True for what can name a repository of the hub and is no path of a file."""
    return NAME.fullmatch(entry) is not None and not entry.endswith(".json")


def fetched(name: str) -> Path:
    """The folder of a repository's tokenizer: from the local cache of the hub, without a network, if it is there; else
    fetched. Raises `UserError`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, revision = name.partition("@")

    def folder(local: bool) -> Path:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FETCHED),
                                      local_files_only=local))

    try:
        here = folder(local=True)
    except (LocalEntryNotFoundError, ValueError):
        here = None
    if here is not None and (here / "tokenizer.json").is_file():
        return here
    try:
        return folder(local=False)
    except (OSError, ValueError) as error:
        if here is not None and any(here.glob(FETCHED[0])):  # a tokenizer in another format
            return here
        raise UserError(f"data.tokenizer {name} is neither a file nor a folder here, and cannot be fetched from the "
                        f"Hugging Face hub ({one_line(error)}); name a tokenizer.json or a folder with one, look up "
                        f"the name on huggingface.co, or leave it null to train one") from None
