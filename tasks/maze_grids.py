"""Grids of mazes with a start, a goal and a shortest path: carved by a walk, or of random walls."""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from looped.errors import UserError
from looped.tasks.puzzle_files import is_heldout

WALL, OPEN, START, GOAL, WAY = range(1, 6)  # as in `symbols` of the task
GIVE_UP = 50_000
"""Grids drawn in vain before a shortest path of the length asked for is called too rare."""
FEWEST_WALLS, MOST_WALLS = 0.3, 0.5
"""Fractions of the cells of a grid of random walls (Lehnert et al. 2024, arXiv 2402.14083)."""
LONG = 3
"""Steps per side of a shortest path that are long and still quickly found: in milliseconds for sides of 9 to 30, among
carved mazes without loops and among random walls."""


class Carved:
    """Mazes of side n with m x m rooms, m = (n + 1) // 2, opened by a walk from the start; `loops` opens more walls.

    min_path: the least number of steps from start to goal.
    """

    def __init__(self, loops: float, min_path: int) -> None:
        self.loops: float = loops
        self.min_path: int = min_path
        self.per_side: int = 1 if loops else LONG  # every opened wall may shorten the paths

    def draw(self, rng: np.random.Generator, side: int, heldout: bool) -> tuple[np.ndarray, list[int]]:
        """(cells of a maze, cells of a shortest path with start and goal)."""
        rooms = (side + 1) // 2
        place, near = _plan(rooms)
        for _ in range(GIVE_UP):
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
                way = self._way(inputs, parent, place, order[0], goal)
                if len(way) > self.min_path:
                    return inputs, way
        raise too_rare(self.min_path, side)

    def _way(self, inputs: np.ndarray, parent: dict[int, int], place: Sequence[int], start: int, goal: int,
             ) -> list[int]:
        if self.loops:
            return shortest_way(inputs != WALL, place[start], place[goal])
        way = [goal]
        while way[-1] != start:
            way.append(parent[way[-1]])
        steps = [place[room] for room in way]
        return steps + [(a + b) // 2 for a, b in pairwise(steps)]


class RandomWalls:
    """Grids of side n in which 0.3 to 0.5 of the cells, drawn at random, are walls: the mazes of Lehnert et al. (2024,
    arXiv 2402.14083), of which Maze-Hard keeps those of side 30 with a shortest path longer than 110 (Wang et al. 2025,
    arXiv 2506.21734). Start and goal are two open cells; usually there are several paths.

    min_path: the least number of steps from start to goal; 0: as many as the side has cells, less one.
    """

    def __init__(self, min_path: int) -> None:
        self.min_path: int = min_path
        self.per_side: int = LONG

    def draw(self, rng: np.random.Generator, side: int, heldout: bool) -> tuple[np.ndarray, list[int]]:
        """(cells of a maze, cells of a shortest path with start and goal)."""
        cells = side**2
        least = self.min_path or side - 1
        for _ in range(GIVE_UP):
            num_walls = rng.integers(round(FEWEST_WALLS * cells), round(MOST_WALLS * cells) + 1)
            order = rng.permutation(cells)
            free = np.ones(cells, dtype=bool)
            free[order[:num_walls]] = False
            start = int(order[num_walls])
            goals = far_cells(free, start, least)
            if not len(goals):
                continue
            inputs = np.where(free, OPEN, WALL)
            inputs[start] = START
            for goal in rng.permutation(goals).tolist():
                inputs[goal] = GOAL
                if is_heldout(inputs) == heldout:
                    return inputs, shortest_way(free, start, goal)
                inputs[goal] = OPEN
        raise too_rare(least, side)


def sides_with(steps: int, per_side: int, sides: Sequence[int]) -> tuple[int, ...]:
    """Those of `sides` whose mazes surely have paths of so many steps, at `per_side` for each cell of the side."""
    return tuple(side for side in sides if steps <= per_side * side)


def too_rare(min_path: int, side: int) -> UserError:
    """The error after too many grids without a path long enough."""
    return UserError(f"task.options.min_path {min_path} is too long for mazes of side {side}: none of {GIVE_UP:,} "
                     f"grids has a shortest path of as many steps; lower it, or raise the side")


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


def far_cells(free: np.ndarray, start: int, least: int) -> np.ndarray:
    """The free cells of a square that are `least` steps or more from the start, ascending.

    All cells at one distance are the bits of an integer, whose shifts are their neighbours.
    """
    side = int(len(free) ** 0.5)
    wide = side + 1  # a column of walls keeps the ends of two rows apart
    padded = np.zeros((side, wide), dtype=bool)
    padded[:, :side] = free.reshape(side, side)
    unseen = int.from_bytes(np.packbits(padded, bitorder="little").tobytes(), "little")
    at = 1 << start // side * wide + start % side
    for _ in range(least):
        unseen &= ~at
        at = (at << 1 | at >> 1 | at << wide | at >> wide) & unseen
        if not at:
            return np.empty(0, dtype=np.int64)
    far = 0
    while at:
        far |= at
        unseen &= ~at
        at = (at << 1 | at >> 1 | at << wide | at >> wide) & unseen
    found = np.unpackbits(np.frombuffer(far.to_bytes(side * wide // 8 + 1, "little"), np.uint8), bitorder="little")
    return np.flatnonzero(found[:side * wide].reshape(side, wide)[:, :side])


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
