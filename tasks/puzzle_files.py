"""Puzzles from CSV files, and the held-out part of generated puzzles.

The files have the columns source, question, answer, rating, with one puzzle per row and one character per cell: the
format of the public sets Sudoku-Extreme and Maze-Hard (Wang et al. 2025, arXiv 2506.21734). The rating is a number, the
higher the harder: in Sudoku-Extreme the backtracks of a solver. `puzzle_choice` chooses among the puzzles read.
"""

import csv
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from looped.errors import UserError

PARTS = ("train.csv", "test.csv")
"""The files of a folder."""
COLUMNS = ["source", "question", "answer", "rating"]
HELD_OUT = 8  # one in this many puzzles is held out
UNKNOWN = 255
BLOCK = 100_000  # rows checked at once: Sudoku-Extreme has four million


def is_heldout(inputs: np.ndarray) -> bool:
    """True if a generated puzzle is held out, decided by its checksum, so that none can be in both parts."""
    return zlib.crc32(inputs.astype(np.uint8).tobytes()) % HELD_OUT == 0


class Puzzles(NamedTuple):
    """N puzzles of L cells, as tokens, and their ratings (NaN for a rating that is no number)."""

    questions: np.ndarray  # (N, L) uint8
    answers: np.ndarray  # (N, L) uint8
    ratings: np.ndarray  # (N,) float64

    def where(self, chosen: np.ndarray) -> "Puzzles":
        return Puzzles(*(column[chosen] for column in self))


Version = tuple[tuple[int, int, int], ...]
"""(number, time of the last change, size) of each file of a path."""
Faults = Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]
"""(questions, answers) -> {description of a fault: mask (N,) of the rows with it}."""


def read_puzzles(path: str, symbols: str, faults: Faults) -> tuple[Puzzles, Puzzles]:
    """(training, held-out) puzzles: train.csv and test.csv of a folder; of a file one row in eight is held out.

    Files that have not changed are read once. Raises UserError for missing files, files of another format, and rows
    with one of `faults`.
    """
    return _read_parts(path, version_of(path), symbols, faults)


def version_of(path: str) -> Version:
    """The version of the files that are read, which differs once one of them is written anew."""
    files = [Path(path) / name for name in PARTS] if Path(path).is_dir() else [Path(path)]
    found = (file.stat() for file in files if file.exists())
    return tuple((stat.st_ino, stat.st_ctime_ns, stat.st_size) for stat in found)


@lru_cache(maxsize=2)
def _read_parts(path: str, version: Version, symbols: str, faults: Faults) -> tuple[Puzzles, Puzzles]:
    if Path(path).is_dir():
        train, heldout = (_read(Path(path) / name, symbols, faults) for name in PARTS)
        if train.questions.shape[1] != heldout.questions.shape[1]:
            raise UserError(f"task.options.path {path}: train.csv has puzzles of {train.questions.shape[1]} cells, "
                            f"test.csv of {heldout.questions.shape[1]}; give two files of one size")
        return train, heldout
    puzzles = _read(Path(path), symbols, faults)
    number = np.arange(len(puzzles.questions), dtype=np.uint64)
    chosen = number * 2654435761 % 2**32 < 2**32 // HELD_OUT  # a multiplicative hash, which holds out row 0
    if chosen.all():
        raise UserError(f"task.options.path {path} has one row, which is held out; give a file with more of them, or a "
                        "folder with train.csv and test.csv")
    return puzzles.where(~chosen), puzzles.where(chosen)


def _read(path: Path, symbols: str, faults: Faults) -> Puzzles:
    table = bytes(symbols.index(chr(code)) if chr(code) in symbols else UNKNOWN for code in range(256))
    blocks: list[Puzzles] = []
    length = None
    for start, rows in _blocks(path):
        length = length or len(rows[0][0])
        for number, (question, answer, _) in enumerate(rows):
            if not len(question) == len(answer) == length:
                raise UserError(f"{path}, row {start + number}: question and answer have {len(question)} and "
                                f"{len(answer)} cells, the file's first question {length}; give rows of one size")
        cells = b"".join((question + answer).encode("latin-1", "replace") for question, answer, _ in rows)
        tokens = np.frombuffer(cells.translate(table), dtype=np.uint8).reshape(len(rows), 2, length)
        puzzles = Puzzles(tokens[:, 0], tokens[:, 1], np.array([_number(rating) for _, _, rating in rows]))
        unknown = {f"has a character that is none of '{symbols}'": (tokens == UNKNOWN).any(axis=(1, 2))}
        for found in (unknown, faults(tokens[:, 0], tokens[:, 1])):  # the second relies on known tokens
            for what, at in found.items():
                if at.any():
                    raise UserError(f"{path}, row {start + int(at.argmax())}: it {what}; fix the row or leave it out")
        blocks.append(puzzles)
    if not blocks:
        raise UserError(f"{path} has no rows; give a file with puzzles in it")
    return Puzzles(*(np.concatenate(column) for column in zip(*blocks, strict=True)))


def _number(rating: str) -> float:
    try:
        return float(rating)
    except ValueError:
        return float("nan")


def _blocks(path: Path) -> Iterator[tuple[int, list[tuple[str, str, str]]]]:
    """(number of the first row; question, answer and rating of BLOCK rows at a time); rows count from 1, after the
    header."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            if next(reader, None) != COLUMNS:
                raise UserError(f"{path} does not have the columns {', '.join(COLUMNS)}; give a file with this header")
            start = 1
            while rows := list(islice(reader, BLOCK)):
                for number, row in enumerate(rows):
                    if len(row) != len(COLUMNS):
                        raise UserError(f"{path}, row {start + number}: it has {len(row)} columns, not {len(COLUMNS)}; "
                                        "fix the row or leave it out")
                yield start, [(question, answer, rating) for _, question, answer, rating in rows]
                start += len(rows)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"task.options.path: {path} cannot be read: {error}; give a CSV file with the columns "
                        f"{', '.join(COLUMNS)}, or a folder with train.csv and test.csv") from None
