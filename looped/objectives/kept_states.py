"""States of training sequences kept from visit to visit (`revisit.keep`): one visit per step, depth over the epochs.

    fresh visit    state_1 = unroll(initial state, e)
    later visit    state_k = unroll(detach(state_{k-1}), e), with state_{k-1} of the epoch before, by its weights

The key of a sequence is the number of its window in the text: an epoch takes each of the same windows once, in another
order (`looped.data.token_windows`). States live on the host. Those of a step are stored after it, so that a step reads
the same however it is split into micro-batches. A checkpoint holds them all (`Objective.to_carry`).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looped.config import Config
from looped.config.revisit import RevisitConfig
from looped.data.token_windows import items_of
from looped.devices import to_device
from looped.errors import UserError
from looped.rng import StepRandom
from looped.tensor_types import Float


class NothingKept:
    """Every visit begins anew."""

    clause: str = ""
    """The difference that it makes between steps (`Objective.changes`)."""

    one_process: str = ""
    """The reason why only one process may train, as a clause (`Objective.one_process`)."""

    def prepare(self, train: Any) -> str:
        """Make room for the states of training data; returns a line for the log, "" for none."""
        return ""

    def visit(self, e: Float[Tensor, "batch length width"], fresh: Callable[[], Tensor],
              random: StepRandom) -> dict[str, Any]:
        """Fields of the `Start` of a training step: the state to go on from, and what to do with the last one. fresh:
        gives the initial state."""
        return {}

    def store(self) -> None:
        """Keep the states of the finished step."""

    def metrics(self) -> dict[str, Tensor]:
        """Figures of the last step for the log."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of it that a checkpoint needs."""
        return {}

    def take_up(self, tensors: dict[str, Tensor]) -> None:
        """Go on from earlier `tensors`."""


class KeptStates(NothingKept):
    """The last state of every training sequence, and the number of visits behind it; 0: none is kept."""

    clause = "each sequence goes on from the state of its last visit"
    one_process = "revisit.keep keeps the states of all sequences in one process"

    def __init__(self, config: RevisitConfig, length: int, width: int):
        self.config = config
        self.length = length
        self.width = width
        self.train: Any = None
        self.states: Tensor = torch.zeros(0)
        self.visits: Tensor = torch.zeros(0, dtype=torch.int32)
        self.pending: list[tuple[np.ndarray, Tensor, Tensor]] = []
        self.last: Tensor | None = None

    def prepare(self, train: Any) -> str:
        """Raises UserError for data without fixed windows, and for states that are too large."""
        if not hasattr(train, "starts"):
            raise UserError(f"revisit.keep needs training data with fixed windows, and {type(train).__name__} has "
                            f"none; set revisit.keep to false")
        num, dtype, most = train.windows(self.length), getattr(torch, self.config.dtype), self.config.max_gigabytes
        size = num * self.length * self.width * dtype.itemsize / 1e9
        if size > most:
            raise UserError(f"revisit.keep needs {size:.3g} GB for the states of {num:,} sequences, more than "
                            f"revisit.max_gigabytes {most:g}; raise that, set revisit.dtype to bfloat16, or give less "
                            f"text (data.max_bytes)")
        self.train = train
        self.states = torch.zeros(num, self.length, self.width, dtype=dtype)
        self.visits = torch.zeros(num, dtype=torch.int32)
        return f"revisit.keep: the states of {num:,} training sequences, {size:.3g} GB, in memory and in checkpoints"

    def visit(self, e: Float[Tensor, "batch length width"], fresh: Callable[[], Tensor],
              random: StepRandom) -> dict[str, Any]:
        if self.train is None:  # where costs are counted, without data
            return {}
        windows = self.windows_of(random)
        anew = random.uniform("begin anew", ()) < self.config.restart_share
        visits = self.visits[torch.from_numpy(windows)]
        visits = torch.where(anew | (visits >= self.config.max_visits), 0, visits)
        kept = to_device(self.states[torch.from_numpy(windows)], e.device).to(e.dtype)
        state = torch.where(to_device((visits > 0).view(-1, 1, 1), e.device), kept, fresh())
        self.last = (visits + 1).double().mean()

        def keep(state: Float[Tensor, "batch length width"]) -> None:
            self.pending.append((windows, visits + 1, state.detach().to("cpu", self.states.dtype)))

        return {"state": state, "keep": keep}

    def windows_of(self, random: StepRandom) -> np.ndarray:
        """The windows in the rows of a step."""
        items = items_of(random.step, random.total, random.rows)
        return self.train.starts(items, self.length, seed=random.seed) // self.length

    def store(self) -> None:
        """Keep the states of the finished step; of a window that it has met twice, at the end of one epoch and the
        beginning of the next, those of the later visit."""
        for windows, visits, states in self.pending:
            rows = {window: row for row, window in enumerate(windows.tolist())}
            where, which = torch.tensor(list(rows)), torch.tensor(list(rows.values()))
            self.states[where], self.visits[where] = states[which], visits[which]
        self.pending = []

    def metrics(self) -> dict[str, Tensor]:
        """visit: the mean number of the visits that follow on each other, the last one counted."""
        return {} if self.last is None else {"visit": self.last}

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.train is None else {"states": self.states, "visits": self.visits}

    def take_up(self, tensors: dict[str, Tensor]) -> None:
        self.states.copy_(tensors["states"])
        self.visits.copy_(tensors["visits"])


def kept_states(config: Config, model: Any) -> NothingKept:
    """The store of a config, empty until it is opened."""
    if not config.revisit.keep:
        return NothingKept()
    return KeptStates(config.revisit, config.data.length, model.width)
