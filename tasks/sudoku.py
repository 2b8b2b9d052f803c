"""Sudoku: fill the empty cells so that every row, column and box holds every digit once.

Boards are generated from a stock of filled boards by the symmetries of the rules: renaming digits, permuting the bands,
the rows in a band, the stacks, the columns in a stack, and transposing if boxes are square. This gives

    4 x 4:  4! * (2 * 2^2)^2 * 2     =         3,072   on all 288 boards, which are the stock
    6 x 6:  6! * (3! 2!^3) (2! 3!^2) =     2,488,320   on 256 of the 28,200,960 boards
    9 x 9:  9! * (3! 3!^3)^2 * 2     = 1.22 * 10^12    on 256 of the 6.67 * 10^21 boards

variations, times the choices of empty cells. With `unique` the stock also marks cells of every board that can all be
emptied while the solution stays unique; it stays so under symmetries and for any subset of these cells. 9 x 9 has 128
such boards. Training and held-out problems use separate stocks (for 4 x 4 the same boards, as there are no more), and
no row of givens occurs in both: its checksum decides the part. Parts are not separate under symmetries where there are
few boards: of 4 x 4 held-out puzzles nearly all are symmetric to one of the first thousands of training puzzles, so
they measure whether a model generalises over the symmetries; held-out boards of 6 x 6 are mostly symmetric to a
training board, but puzzles on them to no training puzzle.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from looped.data.task import BLANK, Problem, register, rng_of
from looped.errors import UserError
from looped.tasks.puzzle_choice import FilePuzzles, FromFile, check_needs_path, chosen_puzzles, variation_of
from looped.tasks.puzzle_files import is_heldout, read_puzzles
from looped.tasks.puzzle_levels import ByEmptyCells, ByRating
from looped.tasks.sudoku_solver import Solver
from looped.tasks.sudoku_symmetries import SudokuSymmetries, vary

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size: rows and columns of a box
GROUPS = {size: SudokuSymmetries(box) for size, box in BOXES.items()}
NUM_BOARDS = 256
NUM_UNIQUE = {4: 288, 6: 256, 9: 128}  # 9 x 9: 55 ms each


@register
class Sudoku(FromFile):
    """size: 4, 6 or 9. unique: only puzzles with one solution (not for those of a file). path: a CSV like
    Sudoku-Extreme's, or a folder with train.csv and test.csv, whose puzzles are used instead of generated ones; a
    difficulty then draws from all of its puzzles with at most that many empty cells.

    For a file also: symmetries: the number of symmetric puzzles per training puzzle besides itself, or true for any; a
    training puzzle that is symmetric to a held-out one is then left out. num_puzzles: the number of training puzzles,
    chosen at random once for all seeds; null: all. rating_bands: difficulties by rating instead, as the lowest ratings
    of all bands but the first; 0 draws from all puzzles, k from those of the k-th band."""

    name = "sudoku"
    source = "rules of Sudoku; CSV: sapientinc/sudoku-extreme on the Hugging Face hub"
    difficulty = "empty cells"

    def __init__(self, size: int = 4, unique: bool = False, path: str | None = None, symmetries: bool | int = 0,
                 num_puzzles: int | None = None, rating_bands: list[float] | None = None) -> None:
        if size not in BOXES:
            raise UserError(f"task.options.size {size} is not a size of this task; take {', '.join(map(str, BOXES))}")
        if not isinstance(unique, bool):
            raise UserError(f"task.options.unique must be true or false, got {unique!r}")
        if unique and path is not None:
            raise UserError(f"task.options.unique is for generated puzzles, but path {path} is given; keep one of them")
        variation = variation_of(symmetries, GROUPS[size])
        check_needs_path(path, {"symmetries": symmetries, "num_puzzles": num_puzzles, "rating_bands": rating_bands})
        self.size, self.unique, self.box = size, unique, BOXES[size]
        self.symbols = (".", *map(str, range(1, size + 1)))
        self.trained = {4: (10, 10), 6: (24, 24), 9: (20, 51)}[size]
        self.tested = {4: (6, 8, 10, 11), 6: (18, 22, 24, 26), 9: (30, 40, 51)}[size]
        if path is not None:
            self._check_size(str(path))
            parts = chosen_puzzles(str(path), *READING, GROUPS[size] if symmetries else None, num_puzzles)
            levels = ByEmptyCells(parts) if rating_bands is None else ByRating(parts, rating_bands, str(path))
            self.file = FilePuzzles(parts, levels, variation)
            self.file.set_levels_of(self)

    def _check_size(self, path: str) -> None:
        """Raises UserError for a file with boards of another size."""
        length = read_puzzles(path, *READING)[0].questions.shape[1]
        if length != self.size**2:
            raise UserError(f"task.options.path {path} has boards of size {int(length**0.5)}, but task.options.size is "
                            f"{self.size}; set size: {int(length**0.5)}")

    def options_for_file(self, path: str) -> dict[str, Any]:
        cells = read_puzzles(path, *READING)[0].questions.shape[1]
        if cells != self.size**2:
            raise UserError(f"--puzzles {path} has boards of size {int(cells**0.5)}, and this run was trained on size "
                            f"{self.size}; take a run of that size")
        return {"size": self.size, "path": path}

    def pose(self, question: np.ndarray, answer: np.ndarray) -> Problem:
        return Problem(question, answer, question == BLANK)

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        stock, num_removable = board_stock(self.size, self.unique, heldout)
        hardest = min(num_removable.max(), self.size**2 - 1)  # an empty board cannot be in both parts
        if difficulty > hardest:
            raise UserError(f"sudoku of size {self.size} ends at difficulty {hardest} ({self.difficulty}"
                            f"{', with one solution' if self.unique else ''}), got {difficulty}; take that or less")
        bases = np.flatnonzero(num_removable >= difficulty)
        while True:
            board, removable = vary(stock[bases[rng.integers(len(bases))]], self.box, rng).reshape(2, -1)
            empty = np.zeros(len(board), dtype=bool)
            empty[np.argsort(rng.random(len(board)) + (removable == 0))[:difficulty]] = True
            inputs = np.where(empty, BLANK, board)
            if is_heldout(inputs) == heldout:
                return Problem(inputs, board, empty)

    def is_right(self, problem: Problem, answer: np.ndarray) -> bool:
        """True if the board is valid once `answer` fills the empty cells; givens cannot be overwritten."""
        board = np.where(problem.scored, answer, problem.inputs)
        return bool(is_valid(board[None], self.box)[0])

    def coordinates(self, length: int) -> np.ndarray:
        rows, columns = np.divmod(np.arange(length), self.size)
        boxes = rows // self.box[0] * (self.size // self.box[1]) + columns // self.box[1]
        return np.stack([rows, columns, boxes], axis=1)

    def shape(self, length: int) -> tuple[int, int]:
        return self.size, self.size


# ---- boards ----------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=16)
def board_stock(size: int, unique: bool, heldout: bool) -> tuple[np.ndarray, np.ndarray]:
    """(boards to vary, for training or held-out, and masks of the cells that may be emptied, (N, 2, size, size); number
    of these cells per board, (N,))."""
    rng = rng_of("sudoku stock", size, unique, heldout)
    solver = Solver(*BOXES[size])
    if size == 4:
        boards = list(solver.solutions([0] * 16))
    else:
        boards = [solver.random_board(rng) for _ in range(NUM_UNIQUE[size] if unique else NUM_BOARDS)]
    removable = [solver.removable(board, rng) if unique else [True] * size**2 for board in boards]
    stock = np.array([boards, removable]).swapaxes(0, 1).reshape(len(boards), 2, size, size)
    stock.flags.writeable = False
    return stock, stock[:, 1].sum(axis=(1, 2))


def is_valid(boards: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """Mask (N,) of the boards (N, size * size) with every digit once per row, column and box."""
    height, width = box
    size = height * width
    grids = boards.reshape(-1, size, size)
    boxes = grids.reshape(-1, width, height, height, width).swapaxes(2, 3).reshape(-1, size, size)
    units = np.concatenate([grids, grids.swapaxes(1, 2), boxes], axis=1)
    return (np.sort(units, axis=2) == np.arange(1, size + 1)).all(axis=(1, 2))


def _faults(questions: np.ndarray, answers: np.ndarray) -> dict[str, np.ndarray]:
    size = int(questions.shape[1] ** 0.5)
    if size not in BOXES or size**2 != questions.shape[1]:
        return {f"has {questions.shape[1]} cells, and boards have 16, 36 or 81": np.ones(len(questions), dtype=bool)}
    return {
        "has an answer that changes a given": ((questions != BLANK) & (questions != answers)).any(axis=1),
        "has an answer without every digit in every row, column and box": ~is_valid(answers, BOXES[size]),
        "has no empty cell": (questions != BLANK).all(axis=1),
    }


READING = (".123456789", _faults)
"""Symbols and faults of a file: of any size, so that a wrong one is noticed."""
