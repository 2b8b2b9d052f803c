"""What the tests of sudoku and of mazes share."""

import hashlib

import numpy as np


def fingerprint(problem):
    cells = np.concatenate([problem.inputs, problem.targets, problem.scored])
    return hashlib.blake2b(cells.astype(np.uint8).tobytes(), digest_size=6).hexdigest()


def write_csv(path, rows, head="source,question,answer,rating"):
    path.write_text("\n".join([head, *(f"here,{question},{answer},7" for question, answer in rows)]) + "\n")
    return str(path)


def as_text(task, problem):
    return tuple("".join(task.symbols[token] for token in cells) for cells in (problem.inputs, problem.targets))


def write_rated(path, rows, ratings):
    lines = [f"here,{question},{answer},{rating}" for (question, answer), rating in zip(rows, ratings, strict=True)]
    path.write_text("\n".join(["source,question,answer,rating", *lines]) + "\n")
