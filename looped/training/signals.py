"""Signals to a run in training: SIGTERM and Ctrl-C end it after the current step, SIGUSR1 and SIGUSR2 save.

Before there is a step, while text is read and tokenized, SIGTERM and Ctrl-C end it at once.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

SAVING = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""Signals that save after the current step, while training goes on; Windows has none of them."""


FINISHING = b"\nfinishing the step, then saving; a second Ctrl-C ends at once\n"
ENDING = b"\nended before a step was taken; the same command starts again\n"


@dataclass
class Caught:
    """Signals that arrived. number: the last one that ends training, 0 if none did; saves: a checkpoint is due;
    heeded: somebody looks at them, so that the first one that ends training is only recorded."""

    number: int = 0
    saves: bool = False
    heeded: bool = True


@contextmanager
def catch_signals(*, heeded: bool = True) -> Iterator[Caught]:
    """Record signals instead of acting on them. Only a second Ctrl-C ends the process at once: a cluster sends SIGTERM
    to all processes of a job, and a launcher among them passes its own on, so each process gets two.

    While `heeded` is False, the first one raises KeyboardInterrupt, or SystemExit with 143 for SIGTERM.
    """
    caught = Caught(heeded=heeded)
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
        yield caught
        return
    usual = {}

    def end(number, frame):
        first, caught.number = not caught.number, number
        if number == signal.SIGINT:
            signal.signal(number, usual[number])
        if first:
            with suppress(OSError):  # nobody reads it
                os.write(2, FINISHING if caught.heeded else ENDING)  # print is not re-entrant
        if first and not caught.heeded:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def save(number, frame):
        caught.saves = True

    try:
        for number, handle in {signal.SIGTERM: end, signal.SIGINT: end, **dict.fromkeys(SAVING, save)}.items():
            usual[number] = signal.signal(number, handle)
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
