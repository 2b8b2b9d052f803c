"""Files of hard puzzles, train.csv and test.csv, in the format of Sudoku-Extreme and Maze-Hard.

    python scripts/make_puzzles.py sudoku --out puzzles --train 1000 --test 500 --steps 100
    python scripts/make_puzzles.py maze --out mazes --train 1000 --test 1000 --side 30 --min-path 111

Sudoku: 9x9, one solution, about 24 givens, rated by guesses undone (looped.tasks.sudoku_hard). Mazes: random walls and
a shortest path of at least so many steps, which is the rating. A row is a function of the seed, the file and the row's
number, and is written as soon as it is there, so the same command goes on after an interruption, and a higher --train
or --test adds rows. Both files are for `task.options.path`.
"""

import argparse
import csv
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from looped.data.task import find_task
from looped.tasks.puzzle_files import COLUMNS
from looped.tasks.sudoku_hard import hard_puzzle

Row = tuple[str, str, str, str]


def sudoku_row(seed: int, steps: int, source: str, part: str, index: int) -> Row:
    found = hard_puzzle(seed, part, index, steps=steps)
    question, answer = ("".join(map(str, digits)).replace("0", ".") for digits in (found.givens, found.solution))
    return source, question, answer, str(round(found.rating))


def maze_row(seed: int, side: int, min_path: int, source: str, part: str, index: int) -> Row:
    task = find_task("maze", {"walls": "random", "min_path": min_path})
    problem = task.problem(seed, index, side, heldout=part == "test")
    question, answer = ("".join(map(task.symbols.__getitem__, cells)) for cells in (problem.inputs, problem.targets))
    return source, question, answer, str(answer.count("o") + 1)


def rows_kept(path: Path, source: str) -> int:
    """The number of whole rows of a file, after cutting off one that was being written when the last run ended."""
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8", newline="\n")
    text = path.read_text(encoding="utf-8")
    whole = text[:text.rfind("\n") + 1]
    if whole != text:
        os.truncate(path, len(whole.encode()))
    rows = list(csv.reader(whole.splitlines()))
    others = [row[0] for row in rows[1:] if row[0] != source]
    if rows[:1] != [COLUMNS] or others:
        raise SystemExit(f"{path} has rows of another kind ({others[0] if others else 'another header'}, not "
                         f"{source}); give another --out")
    return len(rows) - 1


def write(path: Path, make: Callable[[int], Row], source: str, wanted: int, jobs: int) -> None:
    """Append rows to a file until it has `wanted`."""
    start, first = time.perf_counter(), rows_kept(path, source)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, row in enumerate(rows_from(make, range(first, wanted), jobs), start=first + 1):
            writer.writerow(row)
            file.flush()
            if number % 100 == 0 or number == wanted:
                seconds = (time.perf_counter() - start) / (number - first)
                print(f"{path}: {number} of {wanted}, {seconds:.3f} s each", flush=True)


def rows_from(make: Callable[[int], Row], indices: range, jobs: int) -> Iterator[Row]:
    if jobs == 1:
        yield from map(make, indices)
        return
    with get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(make, indices, chunksize=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    sudoku = kinds.add_parser("sudoku", help="9x9 puzzles with one solution, rated by guesses undone")
    sudoku.add_argument("--steps", type=int, default=100, help="steps of the climb per puzzle; 0: not selected")
    maze = kinds.add_parser("maze", help="random walls and a long shortest path")
    maze.add_argument("--side", type=int, default=30, help="cells")
    maze.add_argument("--min-path", type=int, default=111, help="least number of steps from start to goal")
    sudoku.set_defaults(make=lambda given: partial(sudoku_row, given.seed, given.steps),
                        source=lambda given: f"seed {given.seed} steps {given.steps}")
    maze.set_defaults(make=lambda given: partial(maze_row, given.seed, given.side, given.min_path),
                      source=lambda given: f"seed {given.seed} side {given.side} min_path {given.min_path}")
    for each in (sudoku, maze):
        each.add_argument("--out", type=Path, required=True, help="folder")
        each.add_argument("--train", type=int, default=1000, help="rows of train.csv")
        each.add_argument("--test", type=int, default=1000, help="rows of test.csv")
        each.add_argument("--seed", type=int, default=0)
        each.add_argument("--jobs", type=int, default=1, help="processes")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    source = given.source(given)
    for part, wanted in (("train", given.train), ("test", given.test)):
        write(given.out / f"{part}.csv", partial(given.make(given), source, part), source, wanted, given.jobs)


if __name__ == "__main__":
    main()
