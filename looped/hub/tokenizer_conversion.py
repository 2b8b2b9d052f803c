"""Conversion of other tokenizer formats (vocab.json and merges.txt, sentencepiece) to tokenizer.json by transformers.

looped.data resolves this by name.
"""

from pathlib import Path

from looped.errors import UserError, one_line

WAY_OUT = "name a folder with a tokenizer.json, or leave it null to train one"


def tokenizer_json(folder: Path) -> str:
    """The content of a tokenizer.json equivalent to the tokenizer saved in a folder.

    Raises `UserError` if transformers is missing, or the folder holds no tokenizer that it can convert.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"data.tokenizer {folder} has no tokenizer.json, and other formats need transformers to be "
                        f"converted; pip install 'looped[hub]', or {WAY_OUT}") from None
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # it raises whatever the files, or a package that reads them, raise
        raise UserError(f"data.tokenizer {folder} has no tokenizer.json, and transformers cannot convert what it holds "
                        f"({one_line(error)}); {WAY_OUT}") from None
    finally:
        transformers.utils.logging.set_verbosity(before)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"data.tokenizer {folder} holds a {type(tokenizer).__name__}, which cannot be saved as a "
                        f"tokenizer.json; {WAY_OUT}")
    return backend.to_str()
