"""Figure with a solved example of every task: docs/tasks.png, or a given file.

    python scripts/draw_tasks.py [FILE]
"""

import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread

from looped.data.task import Task, find_task
from looped.evaluation.plots_tasks import plot_problem

EXAMPLES: dict[str, tuple[str, dict, int]] = {
    "Prefix sums": ("prefix-sums", {}, 12), "Parity": ("parity", {}, 10), "Copy": ("copy", {}, 6),
    "Addition, digits reversed": ("addition", {}, 4), "Addition of many numbers": ("nary-addition", {}, 3),
    "p-hop induction, 2 hops": ("p-hop", {"length": 16}, 2), "Word problem of S5": ("s5", {}, 5),
    "Word problem of A5": ("a5", {}, 5), "Sudoku 4x4, 6 clues": ("sudoku", {"size": 4}, 10),
    "Sudoku 6x6, 12 clues": ("sudoku", {"size": 6}, 24), "Sudoku 9x9, 30 clues": ("sudoku", {"size": 9}, 51),
    "Maze 13x13": ("maze", {}, 13),
}
"""Title -> (task, options, difficulty)."""
COLUMNS = 3


def draw(path: Path) -> None:
    """The pictures of `EXAMPLES`, side by side."""
    lines = -(-len(EXAMPLES) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.2 * lines), dpi=110, layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        for axes, (title, example) in zip(figure.subplots(lines, COLUMNS).flat, EXAMPLES.items(), strict=False):
            axes.imshow(imread(_picture(*example, Path(folder) / "one.png")))
            axes.set_title(title, fontsize=9, fontweight="bold")
    for axes in figure.axes:
        axes.axis("off")
    figure.savefig(path)


def _picture(name: str, options: dict, difficulty: int, path: Path) -> Path:
    task: Task = find_task(name, options)
    problem = task.problem(0, 0, difficulty, heldout=True)
    plot_problem(task, problem, problem.targets, path)
    return path


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "docs" / "tasks.png")
