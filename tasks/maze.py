"""Mazes: mark the path from the start to the goal (Schwarzschild et al. 2021, "easy-to-hard-data").

A maze of side n has m x m rooms with m = (n + 1) // 2, and walls one cell thick between them: (2m - 1) x (2m - 1)
cells, so that an even n gives the maze of n - 1. The papers count in the same way: their 9x9 maze has 5x5 rooms. Their
images add the wall around it, which carries no information, and draw two pixels per cell: 24 x 24 for 9x9. Start and
goal are two uniformly drawn rooms. A depth-first walk from the start opens a wall to every other room: a spanning tree,
with a single path from start to goal. `loops` opens more walls, so that there can be several. With `walls` random, n x
n cells have walls at random places instead, as in Maze-Hard.

Every cell is given; for each open one the model predicts whether it is on the path.
"""

from typing import Any

import numpy as np

from looped.data.task import Problem, register
from looped.errors import UserError
from looped.tasks.maze_grids import GOAL, OPEN, START, WALL, WAY, Carved, RandomWalls, shortest_way, sides_with
from looped.tasks.maze_symmetries import SquareSymmetries
from looped.tasks.puzzle_choice import FilePuzzles, FromFile, check_needs_path, chosen_puzzles, variation_of
from looped.tasks.puzzle_levels import ByRating, OneLevel

GROUP = SquareSymmetries()
ALL_HAVE = "maze: all mazes of the file have side"


@register
class Maze(FromFile):
    """loops: fraction of the remaining walls between two rooms that are opened as well, 0 to 1. walls: carved, or
    random, of 0.3 to 0.5 of the cells. min_path: least number of steps from start to goal; 0: any, or with random walls
    one less than the side; without evaluation.difficulties, only sides that surely have such paths are measured, or the
    trained one. path: a CSV like Maze-Hard's, or a folder with train.csv and test.csv, whose mazes are used instead of
    generated ones.

    For a file also: symmetries: true turns and mirrors the training mazes at random; a training maze that is symmetric
    to a held-out one is then left out. num_puzzles: the number of training mazes, chosen at random once for all seeds;
    null: all. rating_bands: difficulties by rating instead, as the lowest ratings of all bands but the first; 0 draws
    from all mazes, k from those of the k-th band."""

    name = "maze"
    source = "aks2203/easy-to-hard-data, make_mazes.py; CSV: sapientinc/maze-30x30-hard-1k on the Hugging Face hub"
    difficulty = "side of the maze"
    easiest = 3
    trained = (9, 9)
    tested = (9, 13, 17)
    symbols = (".", "#", " ", "S", "G", "o")
    colors = {"#": "#3b3b3b", " ": "#ffffff", "S": "#2ca02c", "G": "#d62728", "o": "#1f77b4"}

    def __init__(self, loops: float = 0.0, path: str | None = None, walls: str = "carved", min_path: int = 0,
                 symmetries: bool = False, num_puzzles: int | None = None, rating_bands: list[float] | None = None,
                 ) -> None:
        _check_options(loops, walls, min_path, symmetries, path)
        check_needs_path(path, {"symmetries": symmetries, "num_puzzles": num_puzzles, "rating_bands": rating_bands})
        self.grids = {"carved": Carved(loops, min_path), "random": RandomWalls(min_path)}[walls]
        self.tested = sides_with(min_path, self.grids.per_side, self.tested)
        if path is not None:
            group = GROUP if symmetries else None
            parts = chosen_puzzles(str(path), "".join(self.symbols), _faults, group, num_puzzles)
            side = int(parts[0].questions.shape[1] ** 0.5)
            levels = OneLevel(parts, side, self.difficulty, ALL_HAVE) if rating_bands is None else \
                ByRating(parts, rating_bands, str(path))
            self.file = FilePuzzles(parts, levels, variation_of(symmetries, GROUP))
            self.file.set_levels_of(self)

    def options_for_file(self, path: str) -> dict[str, Any]:
        return {"path": path}

    def pose(self, question: np.ndarray, answer: np.ndarray) -> Problem:
        return Problem(question, np.where(question == OPEN, answer, question), question == OPEN)

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        inputs, way = self.grids.draw(rng, difficulty, heldout)
        targets = inputs.copy()
        targets[way] = WAY
        return self.pose(inputs, targets)

    def is_right(self, problem: Problem, answer: np.ndarray) -> bool:
        """True if the cells marked by `answer` are those of any shortest path, or of the file's answer."""
        if super().is_right(problem, answer):
            return True
        marked = np.where(problem.scored, answer, problem.inputs)
        if (marked[problem.scored] != OPEN).sum() != (marked == WAY).sum():
            return False  # neither open nor on the path
        start, goal = (int(np.flatnonzero(problem.inputs == token)[0]) for token in (START, GOAL))
        within = shortest_way((marked != WALL) & (marked != OPEN), start, goal)
        shortest = shortest_way(problem.inputs != WALL, start, goal)
        return within is not None and len(within) == len(shortest) == (marked == WAY).sum() + 2

    def coordinates(self, length: int) -> np.ndarray:
        return np.stack(np.divmod(np.arange(length), self.shape(length)[1]), axis=1)

    def shape(self, length: int) -> tuple[int, int]:
        return int(length**0.5), int(length**0.5)


def _check_options(loops: float, walls: str, min_path: int, symmetries: bool, path: str | None) -> None:
    if isinstance(loops, bool) or not isinstance(loops, int | float) or not 0 <= loops <= 1:
        raise UserError(f"task.options.loops is a fraction of the walls, got {loops!r}; take one from 0 to 1")
    if walls not in ("carved", "random"):
        raise UserError(f"task.options.walls {walls!r} is neither carved nor random; take one of them")
    if isinstance(min_path, bool) or not isinstance(min_path, int) or min_path < 0:
        raise UserError(f"task.options.min_path {min_path!r} is not a number of steps; write 111, or 0 for any")
    if not isinstance(symmetries, bool):
        raise UserError(f"task.options.symmetries {symmetries!r} is neither true (a maze has eight) nor false")
    if loops and walls == "random":
        raise UserError(f"task.options.loops {loops} is for carved mazes, but walls random is given; keep one of them")
    for name, value in (("loops", loops), ("walls random", walls == "random"), ("min_path", min_path)):
        if value and path is not None:
            raise UserError(f"task.options.{name} is for generated mazes, but path {path} is given; keep one of them")


def _faults(questions: np.ndarray, answers: np.ndarray) -> dict[str, np.ndarray]:
    side = int(questions.shape[1] ** 0.5)
    if side**2 != questions.shape[1]:
        return {f"has {questions.shape[1]} cells, which is no square": np.ones(len(questions), dtype=bool)}
    one_each = ((questions == START).sum(axis=1) == 1) & ((questions == GOAL).sum(axis=1) == 1)
    return {
        "has a question of other characters than '# SG'": ((questions < WALL) | (questions > GOAL)).any(axis=1),
        "has not one S and one G": ~one_each,
        "has an answer with other walls": ((questions == WALL) != (answers == WALL)).any(axis=1),
        "has an answer with other characters than ' ' and 'o' in open cells":
            ((questions == OPEN) & (answers != OPEN) & (answers != WAY)).any(axis=1),
        "has an answer whose path does not lead from S to G": np.array([
            given and not _leads(question, answer)
            for given, question, answer in zip(one_each, questions, answers, strict=True)], dtype=bool),
    }


def _leads(question: np.ndarray, answer: np.ndarray) -> bool:
    """True if the marked cells of an answer connect the start to the goal."""
    start, goal = (int(np.flatnonzero(question == token)[0]) for token in (START, GOAL))
    return shortest_way((answer == WAY) | (question == START) | (question == GOAL), start, goal) is not None
