"""Symmetries of Sudoku: digits renamed, bands, rows in a band, stacks and columns in a stack permuted, and, if boxes
are square, rows and columns exchanged.

9x9 has 9! * (3! 3!^3)^2 * 2 = 9! * 6^8 * 2 of them. `vary` draws one. Two puzzles are symmetric exactly if their
canonical forms are equal; `invariants`, which are equal for symmetric puzzles and nearly always differ for others, are
a hundred times as fast and tell which puzzles need one.
"""

from functools import cached_property
from itertools import permutations, product

import numpy as np

from looped.data.task import BLANK
from looped.tasks.hashes import mixed

IN_CACHE = 256
"""Puzzles hashed at once."""


def vary(board: np.ndarray, box: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random symmetry of the rules, applied to a board and its mask of cells: (2, size, size)."""
    height, width = box  # a band has `height` rows, and there are `width` bands
    size = height * width
    draws = rng.random(3 * size + height + width + 1)  # one call: calls dominate the cost
    digits, rows, columns, bands, stacks, flip = np.split(draws, np.cumsum([size, size, size, width, height]))
    rows = np.argsort(bands)[:, None] * height + np.argsort(rows.reshape(width, height), axis=1)
    columns = np.argsort(stacks)[:, None] * width + np.argsort(columns.reshape(height, width), axis=1)
    digits, cells = board[:, rows.ravel()][:, :, columns.ravel()]
    varied = np.stack([1 + np.argsort(draws[:size])[digits - 1], cells])
    return varied.swapaxes(1, 2) if height == width and flip[0] < 0.5 else varied


class SudokuSymmetries:
    """The symmetries of boards with boxes of `height` rows and `width` columns; a `Group` of `puzzle_choice`."""

    def __init__(self, box: tuple[int, int]) -> None:
        self.box: tuple[int, int] = box
        self.size: int = box[0] * box[1]

    def vary(self, question: np.ndarray, answer: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A random symmetry, applied to a question and its answer (size * size,): both as int64."""
        layers = np.stack([answer, question != BLANK]).astype(np.int64).reshape(2, self.size, self.size)
        board, given = vary(layers, self.box, rng).reshape(2, -1)
        return np.where(given, board, BLANK), board

    def invariants(self, questions: np.ndarray) -> np.ndarray:
        """(N,) uint64 of puzzles (N, size * size), the same for symmetric ones.

        Colour refinement: a cell's hash takes in those of its row, band, column, stack, box and digit, twice.
        """
        parts = [questions[start : start + IN_CACHE] for start in range(0, len(questions), IN_CACHE)]
        return np.concatenate([np.empty(0, dtype=np.uint64), *map(self._refined, parts)])

    def _refined(self, questions: np.ndarray) -> np.ndarray:
        height, width = self.box
        grids = questions.reshape(-1, self.size, self.size)
        cells = mixed((grids != BLANK).astype(np.uint64))
        for _ in range(2):
            rows, columns = cells.sum(axis=2), cells.sum(axis=1)
            rows = mixed(rows + 3 * _of_groups(rows, height))
            columns = mixed(columns + 3 * _of_groups(columns, width))
            if height != width:
                columns = 5 * columns
            boxes = mixed(cells.reshape(-1, width, height, height, width).sum(axis=(2, 4)))
            boxes = boxes.repeat(height, axis=1).repeat(width, axis=2)
            digits = [np.where(grids == digit, cells, 0).sum(axis=(1, 2)) for digit in range(self.size + 1)]
            tokens = grids.reshape(len(grids), -1).astype(np.intp)
            digits = np.take_along_axis(mixed(np.stack(digits, axis=1)), tokens, axis=1)
            cells = mixed(cells + 7 * (rows[:, :, None] + columns[:, None]) + 11 * boxes
                          + 13 * digits.reshape(grids.shape))
        return cells.sum(axis=(1, 2))

    def canonical(self, question: np.ndarray) -> bytes:
        """The least of all puzzles that are symmetric to one with an empty cell (size * size,), in some order.

        The order is by the cells that are given, column by column, then by the digits, renamed in order of appearance;
        for each order of the rows the best order of the columns is found by sorting.
        """
        grid = question.reshape(self.size, self.size)
        turned = [grid, grid.T] if self.box[0] == self.box[1] else [grid]
        return min(map(self._least, turned))[1]

    def _least(self, grid: np.ndarray) -> tuple[tuple[int, ...], bytes]:
        """(codes of the columns, digits) of the least board without exchange of rows and columns."""
        (height, width), size = self.box, self.size
        code = 1 << np.arange(size)[::-1]
        codes = ((grid != BLANK)[self._row_orders] * code[:, None]).sum(axis=1)  # (orders, columns)
        stacks = np.sort(codes.reshape(-1, height, width), axis=2) @ (1 << size * np.arange(width)[::-1])
        stacks = np.sort(stacks, axis=1)
        least = np.arange(len(stacks))
        for place in range(height):
            key = stacks[least, place]
            least = least[key == key.min()]
        wanted = np.sort(codes[least[0]].reshape(height, width), axis=1)
        wanted = wanted[np.argsort(wanted @ (1 << size * np.arange(width)[::-1]), kind="stable")].ravel()
        found = []
        for rows in least:
            columns = self._column_orders[(codes[rows][self._column_orders] == wanted).all(axis=1)]
            found.append(_least_digits(grid[self._row_orders[rows]][:, columns]))
        return tuple(wanted.tolist()), min(found)

    @cached_property
    def _row_orders(self) -> np.ndarray:
        return _orders(groups=self.box[1], each=self.box[0])

    @cached_property
    def _column_orders(self) -> np.ndarray:
        return _orders(groups=self.box[0], each=self.box[1])


def _of_groups(lines: np.ndarray, each: int) -> np.ndarray:
    """For every line (N, size) the hash of its group of `each` lines."""
    return mixed(mixed(lines).reshape(len(lines), -1, each).sum(axis=2)).repeat(each, axis=1)


def _orders(groups: int, each: int) -> np.ndarray:
    """All orders of lines that keep groups together: (groups! * each!^groups, groups * each)."""
    within = list(permutations(range(each)))
    return np.array([[each * group + line for group, lines in zip(outer, inner, strict=True) for line in lines]
                     for outer in permutations(range(groups)) for inner in product(within, repeat=groups)])


def _least_digits(grids: np.ndarray) -> bytes:
    """The least of boards (rows, M, columns), digits renamed in the order in which they appear."""
    boards = grids.swapaxes(0, 1).reshape(grids.shape[1], -1)
    digits = np.arange(1, grids.shape[2] + 1)
    seen = boards[:, :, None] == digits
    first = np.where(seen.any(axis=1), seen.argmax(axis=1), boards.shape[1])
    names = np.argsort(np.argsort(first, axis=1, kind="stable"), axis=1) + 1
    names = np.concatenate([np.zeros_like(names[:, :1]), names], axis=1)
    renamed = np.take_along_axis(names, boards.astype(np.intp), axis=1).astype(np.uint8)
    return min(row.tobytes() for row in renamed)
