"""Token losses, eval/tokens.parquet: the loss of each held-out token at each depth, or at its early exit.

One row per token: {run, data, step, settings, sequence, position, token, depth, by, nats, steps}. `sequence` is the
index in eval/sequences.jsonl, `position` the token's place in it, counted from 0; the first token has no loss. `by` is
"" for a plain depth, else the name of an exit: `depth` is then the maximum number of steps, `steps` the token's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from looped.atomic_files import replacing
from looped.errors import UserError
from looped.evaluation.result_files import IDENTITY, EvaluationFiles, writing_to
from looped.tensor_types import Float, Int

if TYPE_CHECKING:
    from pandas import DataFrame

TOKENS = "eval/tokens.parquet"
KEY = [*IDENTITY, "depth", "by"]
"""New rows replace old ones that agree in these columns."""


@dataclass(frozen=True)
class TokenLosses:
    """Nats of each token but the first, at a depth or at its early exit after `steps` steps."""

    tokens: Int[Tensor, "num length_and_one"]
    nats: Float[Tensor, "num length"]
    depth: int
    by: str = ""
    steps: Int[Tensor, "num length"] | None = None

    def table(self, common: dict[str, Any]) -> "DataFrame":
        """One row per token. common: the values of `IDENTITY`, the same for all rows."""
        num, length = self.nats.shape
        steps = None if self.steps is None else self.steps.flatten().numpy()
        return pandas_for("--per-token").DataFrame({
            **{name: common.get(name, "") for name in ("run", "data", "step", "settings")},
            "sequence": np.repeat(np.arange(num), length), "position": np.tile(np.arange(1, length + 1), num),
            "token": self.tokens[:, 1:].flatten().cpu().numpy(), "depth": self.depth, "by": self.by,
            "nats": self.nats.flatten().numpy(), "steps": steps}).astype({"steps": "Int64"})


def pandas_for(what: str) -> Any:
    """The module pandas, which `what` needs. Raises UserError if it is missing."""
    try:
        import pandas
    except ImportError:
        raise UserError(f"{what} needs pandas, which is not installed; pip install pandas") from None
    return pandas


def add_tokens(files: EvaluationFiles, found: Sequence[TokenLosses]) -> Path:
    """Add rows to the file in an evaluation's folder, keep those of other evaluations; its path. Raises UserError."""
    pandas, path = pandas_for("--per-token"), files.folder / TOKENS
    new = pandas.concat([each.table(files.common) for each in found], ignore_index=True)
    with writing_to(files.folder), files.lock():
        if path.is_file():
            old = pandas.read_parquet(path)
            replaced = pandas.MultiIndex.from_frame(new[KEY].drop_duplicates())
            old = old[~pandas.MultiIndex.from_frame(old[KEY]).isin(replaced)]
            new = pandas.concat([old, new], ignore_index=True)
        with replacing(path) as temporary:
            new.to_parquet(temporary, index=False)
    return path
