"""Where a trained model fails on Sudoku: by the techniques that a puzzle needs, and by cell.

    python scripts/sudoku_failures.py RUN --difficulty 51 --depth 51 --num 256
    python scripts/sudoku_failures.py RUN --puzzles FOLDER --difficulty 64 --depth 64 --evaluation.trajectories 8

For puzzles of one solution. A cell belongs to the hardest technique that deduction had needed before it was filled
(`looped.tasks.sudoku_techniques`), and to the round of singles in which it was. A table has the share of puzzles solved
by the hardest technique that they need, and the share of right cells by technique and by round.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from looped import load_run
from looped.data.task import Problem
from looped.data.task_data import puzzles_of_file
from looped.errors import UserError
from looped.inference.rollout import answer
from looped.objectives.base import evaluating
from looped.reports.markdown import markdown_table
from looped.tasks.sudoku_solver import Solver
from looped.tasks.sudoku_techniques import TECHNIQUES, Deduced, deduce
from looped.training.runs import Run

ROUNDS = (0, 1, 2, 4, 8)
"""First round of each group."""


class Answered(NamedTuple):
    """A puzzle: the cells answered right, those to fill (both (cells,)), and the deductions."""

    right: np.ndarray
    scored: np.ndarray
    deduced: Deduced


def answers_of(run: Run, difficulty: int, depth: int, num: int) -> list[Answered]:
    """The held-out puzzles with their answers. Raises UserError for another task, and for puzzles of several solutions,
    of which any may be the answer."""
    if run.config.task.name != "sudoku":
        raise UserError(f"{run.path} was trained on {run.config.task.name or run.config.kind.name}; this script is for "
                        f"sudoku")
    problems, size, found = run.data.heldout(num, difficulty), run.config.evaluation.batch_size, []
    several = sum(not has_one_solution(problem, run.data.task.box) for problem in problems)
    if several:
        raise UserError(f"{several} of {len(problems)} puzzles have several solutions, any of which is right; train "
                        f"with --task.options '{{size: {run.data.task.size}, unique: true}}', or give --puzzles with "
                        f"one solution each")
    with evaluating(run.objective):
        for first in range(0, len(problems), size):
            some = problems[first : first + size]
            cells = answer(run.objective, run.data.collate(some), [depth], run.config, first=first)[depth].answers
            found += [Answered(row[: len(each)] == each.targets, each.scored, deduce(each.inputs, run.data.task.box))
                      for each, row in zip(some, cells.cpu().numpy(), strict=True)]
    return found


def has_one_solution(problem: Problem, box: tuple[int, int]) -> bool:
    return len(list(islice(Solver(*box).solutions(problem.inputs.tolist()), 2))) == 1


def by_technique(found: Sequence[Answered]) -> str:
    """Per technique: the puzzles that need it at most, the share of them solved, and the right ones among its cells."""
    rows = []
    for number, name in enumerate(TECHNIQUES):
        own = [(right, scored) for right, scored, deduced in found if deduced.hardest == number]
        cells = [right[scored & (deduced.technique == number)] for right, scored, deduced in found]
        solved = np.mean([right[scored].all() for right, scored in own]) if own else np.nan
        rows.append([name, str(len(own)), _share(solved), str(sum(map(len, cells))), _share(_mean(cells))])
    return markdown_table(["hardest technique", "puzzles", "solved", "cells", "right"], rows)


def by_round(found: Sequence[Answered]) -> str:
    """The right ones among the cells that deduction fills in each group of rounds."""
    rows = []
    for first, end in zip(ROUNDS, (*ROUNDS[1:], 10**6), strict=True):
        cells = [right[scored & (deduced.board > 0) & (deduced.round >= first) & (deduced.round < end)]
                 for right, scored, deduced in found]
        name = f"{first} to {end - 1}" if end - first > 1 and end < 10**6 else f"{first}{' and later' * (end == 10**6)}"
        rows.append([name, str(sum(map(len, cells))), _share(_mean(cells))])
    return markdown_table(["round of singles", "cells", "right"], rows)


def wrong_cells(found: Sequence[Answered]) -> str:
    """How many cells are wrong in the puzzles that are not solved."""
    wrong = [int((~right[scored]).sum()) for right, scored, _ in found if not right[scored].all()]
    if not wrong:
        return "every puzzle is solved"
    return (f"{len(wrong)} of {len(found)} puzzles not solved, with {np.median(wrong):g} wrong cells in the median, "
            f"from {min(wrong)} to {max(wrong)}")


def _mean(cells: Sequence[np.ndarray]) -> float:
    every = np.concatenate(cells)
    return float(every.mean()) if len(every) else np.nan


def _share(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def settings_of(words: Sequence[str]) -> Mapping[str, str]:
    """Settings from `--name value` and `--name=value`. Raises UserError."""
    found, rest = {}, list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (equals or rest):
            raise UserError(f"'{name}' is not a setting with a value; write --evaluation.trajectories 8")
        found[name.removeprefix("--")] = value if equals else rest.pop(0)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--puzzles", help="a file or folder of puzzles, instead of the run's own")
    parser.add_argument("--difficulty", type=int, required=True, help="empty cells")
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--num", type=int, default=256, help="held-out puzzles")
    asked, words = parser.parse_known_args(argv)
    if asked.num < 1 or asked.depth < 1:
        parser.error("--num and --depth are at least 1")
    try:
        run = load_run(asked.run, settings=settings_of(words))
        if asked.puzzles is not None:
            run.data = puzzles_of_file(run.config.task, asked.puzzles)
        found = answers_of(run, asked.difficulty, asked.depth, asked.num)
    except UserError as error:
        parser.error(str(error))
    print("\n\n".join([by_technique(found), by_round(found), wrong_cells(found)]))


if __name__ == "__main__":
    main()
