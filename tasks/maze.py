"""Mazes: mark the path from the start to the goal (Schwarzschild et al. 2021, "easy-to-hard-data").

A maze of side n has m x m rooms with m = (n + 1) // 2, and walls one cell thick between them: (2m - 1) x (2m - 1)
cells, so that an even n gives the maze of n - 1. The papers count in the same way: their 9x9 maze has 5x5 rooms. Their
images add the wall around it, which carries no information, and draw two pixels per cell: 24 x 24 for 9x9. Start and
goal are two uniformly drawn rooms. A depth-first walk from the start opens a wall to every other room: a spanning tree,
with a single path from start to goal. `loops` opens more walls, so that there can be several.

Every cell is given; for each open one the model predicts whether it is on the path.
"""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from looped.data.task import Problem, Task, register
from looped.errors import UserError
from looped.tasks.puzzle_files import Puzzles, is_heldout, read_puzzles

WALL, OPEN, START, GOAL, WAY = range(1, 6)  # as in `symbols`


@register
class Maze(Task):
    """loops: fraction of the remaining walls between two rooms that are opened as well, 0 to 1. path: a CSV like
    Maze-Hard's, or a folder with train.csv and test.csv, whose mazes are used instead of generated ones."""

    name = "maze"
    source = "aks2203/easy-to-hard-data, make_mazes.py; CSV: sapientinc/maze-30x30-hard-1k on the Hugging Face hub"
    difficulty = "side of the maze"
    easiest = 3
    trained = (9, 9)
    tested = (9, 13, 17)
    symbols = (".", "#", " ", "S", "G", "o")
    colors = {"#": "#3b3b3b", " ": "#ffffff", "S": "#2ca02c", "G": "#d62728", "o": "#1f77b4"}

    def __init__(self, loops: float = 0.0, path: str | None = None) -> None:
        if isinstance(loops, bool) or not isinstance(loops, int | float) or not 0 <= loops <= 1:
            raise UserError(f"task.options.loops is a fraction of the walls, got {loops!r}; take one from 0 to 1")
        if loops and path is not None:
            raise UserError(f"task.options.loops is for generated mazes, but path {path} is given; keep one of them")
        self.loops = loops
        self.parts: tuple[Puzzles, Puzzles] | None = None
        if path is not None:
            self.parts = read_puzzles(str(path), "".join(self.symbols), _faults)
            self.easiest = int(self.parts[0].questions.shape[1] ** 0.5)
            self.trained, self.tested = (self.easiest, self.easiest), (self.easiest,)

    def make(self, rng: np.random.Generator, difficulty: int, *, heldout: bool) -> Problem:
        if self.parts is None:
            inputs, way = self._draw(rng, (difficulty + 1) // 2, heldout)
        elif difficulty == self.easiest:
            row = rng.integers(len(self.parts[heldout].questions))
            inputs, answer = (part[row].astype(np.int64) for part in self.parts[heldout])
            way = np.flatnonzero(answer == WAY)
        else:
            raise UserError(f"maze: all mazes of the file have side {self.easiest}, got difficulty {difficulty}; take "
                            f"{self.easiest}")
        targets = inputs.copy()
        targets[way] = WAY
        targets = np.where(inputs == OPEN, targets, inputs)
        return Problem(inputs, targets, inputs == OPEN)

    def _draw(self, rng: np.random.Generator, rooms: int, heldout: bool) -> tuple[np.ndarray, list[int]]:
        """(cells of a maze, cells of a shortest path with start and goal)."""
        place, near = _plan(rooms)
        while True:
            order = rng.permutation(rooms**2).tolist()  # the start, and the goals to try
            parent = carve(near, order[0], rng.random(rooms**2 - 1).tolist())
            cells = np.full((2 * rooms - 1) ** 2, WALL)
            cells[place] = OPEN
            cells[[(place[room] + place[before]) // 2 for room, before in parent.items()]] = OPEN
            cells[place[order[0]]] = START
            if self.loops:
                walls = np.array([wall for wall in _walls(rooms) if cells[wall] == WALL])
                cells[rng.permutation(walls)[:round(self.loops * len(walls))]] = OPEN
            for goal in order[1:]:
                inputs = cells.copy()
                inputs[place[goal]] = GOAL
                if is_heldout(inputs) != heldout:
                    continue
                if self.loops:
                    return inputs, shortest_way(inputs != WALL, place[order[0]], place[goal])
                way = [goal]
                while way[-1] != order[0]:
                    way.append(parent[way[-1]])
                steps = [place[room] for room in way]
                return inputs, steps + [(a + b) // 2 for a, b in pairwise(steps)]

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


@lru_cache(maxsize=64)
def _plan(rooms: int) -> tuple[list[int], list[list[int]]]:
    """(cell of every room, neighbours of every room)."""
    where = [divmod(room, rooms) for room in range(rooms**2)]
    place = [2 * row * (2 * rooms - 1) + 2 * column for row, column in where]
    around = [((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)) for row, column in where]
    near = [[r * rooms + c for r, c in four if 0 <= r < rooms and 0 <= c < rooms] for four in around]
    return place, near


@lru_cache(maxsize=64)
def _walls(rooms: int) -> list[int]:
    """The cells between two rooms."""
    place, near = _plan(rooms)
    return [(place[room] + place[other]) // 2 for room, others in enumerate(near) for other in others if room < other]


def carve(near: Sequence[Sequence[int]], start: int, draws: Sequence[float]) -> dict[int, int]:
    """The walk that opens a maze, room -> the room it was entered from; draws: one in [0, 1) per room but the start."""
    parent, way = {start: start}, [start]
    for draw in draws:
        while not (fresh := [room for room in near[way[-1]] if room not in parent]):
            way.pop()
        room = fresh[int(draw * len(fresh))]
        parent[room] = way[-1]
        way.append(room)
    return parent


def shortest_way(free: np.ndarray, start: int, goal: int) -> list[int] | None:
    """The cells of a shortest path over free cells of a square, from goal to start; None if there is none.

    Of several, always the same one is returned: breadth first, trying right, down, left, up.
    """
    side = int(len(free) ** 0.5)
    padded = np.pad(free.reshape(side, side), 1).ravel().tolist()
    wide = side + 2
    first, last = ((cell // side + 1) * wide + cell % side + 1 for cell in (start, goal))
    parent, queue = {first: first}, deque([first])
    while queue and last not in parent:
        cell = queue.popleft()
        for other in (cell + 1, cell + wide, cell - 1, cell - wide):
            if padded[other] and other not in parent:
                parent[other] = cell
                queue.append(other)
    if last not in parent:
        return None
    way = [last]
    while way[-1] != first:
        way.append(parent[way[-1]])
    return [(cell // wide - 1) * side + cell % wide - 1 for cell in way]


def _faults(questions: np.ndarray, answers: np.ndarray) -> dict[str, np.ndarray]:
    side = int(questions.shape[1] ** 0.5)
    if side**2 != questions.shape[1]:
        return {f"has {questions.shape[1]} cells, which is no square": np.ones(len(questions), dtype=bool)}
    ends = (questions == START) | (questions == GOAL)
    grids = np.pad((ends | (answers == WAY)).reshape(-1, side, side), ((0, 0), (1, 1), (1, 1)))
    touched = grids[:, 2:, 1:-1] | grids[:, :-2, 1:-1] | grids[:, 1:-1, 2:] | grids[:, 1:-1, :-2]
    return {
        "has a question of other characters than '# SG'": ((questions < WALL) | (questions > GOAL)).any(axis=1),
        "has not one S and one G": ((questions == START).sum(axis=1) != 1) | ((questions == GOAL).sum(axis=1) != 1),
        "has an answer with other walls": ((questions == WALL) != (answers == WALL)).any(axis=1),
        "has an answer with other characters than ' ' and 'o' in open cells":
            ((questions == OPEN) & (answers != OPEN) & (answers != WAY)).any(axis=1),
        "has an answer whose path does not touch S and G": (ends & ~touched.reshape(ends.shape)).any(axis=1),
    }
