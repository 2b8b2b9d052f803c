"""Sudoku by backtracking on bit masks: all solutions of a puzzle, random boards, and cells that can be emptied."""

from collections.abc import Iterator, Sequence

import numpy as np


class Solver:
    """Solver for boards of `rows * columns` digits with `rows` x `columns` boxes; a board is a flat list, 0: empty."""

    def __init__(self, rows: int, columns: int) -> None:
        self.size: int = rows * columns
        places = [divmod(cell, self.size) for cell in range(self.size**2)]
        self.units: list[tuple[int, int, int]] = [
            (row, column, row // rows * rows + column // columns) for row, column in places]
        """(row, column, box) of every cell."""

    def solutions(self, board: Sequence[int], *, barred: tuple[int, int] | None = None,
                  order: Sequence[Sequence[int]] | None = None) -> Iterator[list[int]]:
        """All solutions of `board`, one after another; none if its digits clash.

        barred: (cell, a digit that it must not take). order: for every cell the order in which digits are tried.
        """
        size, units = self.size, self.units
        board, every = list(board), (1 << size) - 1
        order = order or [range(1, size + 1)] * size**2
        in_row, in_column, in_box = [0] * size, [0] * size, [0] * size  # bit d-1: the digit d is there
        barred_cell, barred_bit = (barred[0], 1 << (barred[1] - 1)) if barred else (-1, 0)

        def put(cell: int, bit: int) -> None:
            row, column, box = units[cell]
            in_row[row] ^= bit
            in_column[column] ^= bit
            in_box[box] ^= bit

        def free(cell: int) -> int:
            row, column, box = units[cell]
            taken = in_row[row] | in_column[column] | in_box[box]
            return every & ~(taken | barred_bit if cell == barred_cell else taken)

        for cell, digit in enumerate(board):
            if digit:
                if not free(cell) & 1 << (digit - 1):
                    return
                put(cell, 1 << (digit - 1))
        empty = {cell: None for cell, digit in enumerate(board) if not digit}  # ordered, which a set is not

        def fill() -> Iterator[list[int]]:
            if not empty:
                yield list(board)
                return
            fewest, bits, cell = size + 1, 0, -1
            for one in empty:  # the cell with the fewest digits left
                left = free(one)
                count = left.bit_count()
                if count < fewest:
                    fewest, bits, cell = count, left, one
                    if count < 2:
                        break
            del empty[cell]
            for digit in order[cell]:
                bit = 1 << (digit - 1)
                if bits & bit:
                    board[cell] = digit
                    put(cell, bit)
                    yield from fill()
                    put(cell, bit)
            board[cell] = 0
            empty[cell] = None

        return (yield from fill())

    def random_board(self, rng: np.random.Generator) -> list[int]:
        """A filled board: the first one found when every cell tries its digits in a random order (not uniform)."""
        digits = np.tile(np.arange(1, self.size + 1), (self.size**2, 1))
        return next(self.solutions([0] * self.size**2, order=rng.permuted(digits, axis=1).tolist()))

    def removable(self, solution: Sequence[int], rng: np.random.Generator) -> list[bool]:
        """Mask of a maximal set of cells that can all be emptied while `solution` stays the only one.

        If only some of them are emptied, more cells are given, so the solution stays unique as well.
        """
        board = list(solution)
        for cell in rng.permutation(self.size**2).tolist():
            digit, board[cell] = board[cell], 0
            if next(self.solutions(board, barred=(cell, digit)), None):
                board[cell] = digit
        return [digit == 0 for digit in board]
