"""Figure with a solved example of every task: docs/tasks.png, or a given file.

    python scripts/draw_tasks.py [FILE]
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from looped.data.task import Cells, Problem, Task, find_task
from looped.evaluation.plots_tasks import GIVEN, SOUGHT, draw_cells

EXAMPLES: dict[str, tuple[str, dict, int]] = {
    "Prefix sums": ("prefix-sums", {}, 12), "Parity": ("parity", {}, 10), "Copy": ("copy", {}, 6),
    "Addition, digits reversed": ("addition", {}, 4), "Addition of many numbers": ("nary-addition", {}, 3),
    "p-hop induction, 2 hops": ("p-hop", {"length": 16}, 2), "Word problem of S5, swaps": ("s5", {"moved": 2}, 5),
    "Word problem of A5, 3-cycles": ("a5", {"moved": 3}, 5), "Sudoku 4x4, 6 clues": ("sudoku", {"size": 4}, 10),
    "Sudoku 6x6, 12 clues": ("sudoku", {"size": 6}, 24), "Sudoku 9x9, 30 clues": ("sudoku", {"size": 9}, 51),
    "Maze 9x9": ("maze", {}, 9),
}
"""Title -> (task, options, difficulty)."""
COLUMNS = 2
CELL = 0.25
"""Inches; the same in every panel, except that a symbol of several letters has a larger one."""
WIDTH, GAP, TITLE = 19 * CELL, CELL, 1.6 * CELL
"""Inches of a panel, between panels, and of a title."""
EDGE = 0.12
"""Cells of margin that `draw_cells` leaves for the lines around a table."""


class Panel:
    """A problem and its answer, one below the other if they are rows."""

    def __init__(self, title: str, name: str, options: dict, difficulty: int):
        self.title = title
        self.task: Task = find_task(name, options)
        self.problem: Problem = self.task.problem(0, 1, difficulty, heldout=True)
        self.lines, self.columns = self.task.shape(len(self.problem))
        self.cell = CELL * max(1, 0.6 * max(len(each) for each in self.task.symbols if each not in self.task.colors))
        self.is_row = self.lines == 1

    @property
    def height(self) -> float:
        return TITLE + self.lines * self.cell * (2 if self.is_row else 1) + 0.3 * CELL

    def tables(self) -> Iterator[tuple[Cells, np.ndarray, float, float]]:
        """(cells, their colours, inches from the left, inches from the top), of the problem and of its answer."""
        p, right, below = self.problem, (self.columns + 1) * self.cell, self.lines * self.cell + 0.3 * CELL
        yield p.inputs, np.full(len(p), GIVEN), 0, TITLE
        yield (np.where(p.scored, p.targets, p.inputs), np.where(p.scored, SOUGHT, GIVEN),
               *((0, TITLE + below) if self.is_row else (right, TITLE)))

    def draw(self, figure: Figure, left: float, top: float) -> None:
        """Draw it at a place, in inches from the figure's upper left corner."""
        wide, high = figure.get_size_inches()
        figure.text(left / wide, 1 - (top + 0.7 * TITLE) / high, self.title, fontsize=11, fontweight="bold")
        for cells, ink, x, y in self.tables():
            size = (self.columns + EDGE) * self.cell, (self.lines + EDGE) * self.cell
            axes = figure.add_axes(((left + x) / wide, 1 - (top + y + size[1]) / high, size[0] / wide, size[1] / high))
            draw_cells(axes, self.task, cells, ink, 1.2 * self.cell)


def draw(path: Path) -> None:
    """The panels of `EXAMPLES`, at one scale."""
    panels = [Panel(title, *example) for title, example in EXAMPLES.items()]
    lines = [panels[first : first + COLUMNS] for first in range(0, len(panels), COLUMNS)]
    heights = [max(panel.height for panel in line) + GAP for line in lines]
    figure = Figure(figsize=(COLUMNS * WIDTH + (COLUMNS + 1) * GAP, sum(heights)), dpi=150)
    top = 0.0
    for line, height in zip(lines, heights, strict=True):
        for place, panel in enumerate(line):
            panel.draw(figure, GAP + place * (WIDTH + GAP), top)
        top += height
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "docs" / "tasks.png")
