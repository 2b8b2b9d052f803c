"""Signals to a run in training: SIGTERM and Ctrl-C end it after the current step, SIGUSR1 and SIGUSR2 save."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SAVING = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""Signals that save after the current step, while training goes on; Windows has none of them."""


@dataclass
class Caught:
    """Signals that arrived. number: the last one that ends training, 0 if none did; saves: a checkpoint is due."""

    number: int = 0
    saves: bool = False


@contextmanager
def catch_signals() -> Iterator[Caught]:
    """Record signals instead of acting on them. Only a second Ctrl-C ends the process at once: a cluster sends SIGTERM
    to all processes of a job, and a launcher among them passes its own on, so each process gets two."""
    caught = Caught()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
        yield caught
        return
    usual = {}

    def end(number, frame):
        if not caught.number:
            os.write(2, b"\nfinishing the step, then saving; a second Ctrl-C ends at once\n")  # print is not re-entrant
        caught.number = number
        if number == signal.SIGINT:
            signal.signal(number, usual[number])

    def save(number, frame):
        caught.saves = True

    try:
        for number, handle in {signal.SIGTERM: end, signal.SIGINT: end, **dict.fromkeys(SAVING, save)}.items():
            usual[number] = signal.signal(number, handle)
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
