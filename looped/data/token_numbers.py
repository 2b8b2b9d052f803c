"""Token ids in place of text, for data without a tokenizer: `3 1 4` is the text of the tokens 3, 1 and 4."""

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from looped.errors import UserError


class TokenNumbers:
    """Reads and writes token ids as numbers, with the interface of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The token ids of numbers between spaces. Raises UserError for anything else."""
        try:
            return [int(number) for number in text.split()]
        except ValueError:
            raise UserError(f"{text[:40]!r} is no list of token ids, and these data have no tokenizer; give numbers, "
                            f"such as '3 1 4'") from None

    def decode(self, ids: Sequence[int] | np.ndarray | Tensor) -> str:
        """The numbers of token ids, each after a space; the -1 after the end of a generated text is dropped."""
        return "".join(f" {int(each)}" for each in ids if each >= 0)

    def json(self) -> str:
        """The content of a tokenizer.json: none, so that all are the same."""
        return ""

    def loss_of(self, text: str) -> NoReturn:
        """Raises UserError, since text has no token ids here."""
        raise UserError("text cannot be encoded for data without a tokenizer; give token ids to looped.evaluate_depth")


def tokenizer_of(data: Any) -> Any:
    """The tokenizer of opened data, or numbers if they have none."""
    return TokenNumbers() if data.tokenizer is None else data.tokenizer
