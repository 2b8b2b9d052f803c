"""Results of evaluated runs as pandas tables: `looped.read_results`. docs/figures.md describes the columns.

    figures    one figure per row                          eval/depth.jsonl
    examples   one value of one held-out example per row   eval/examples.jsonl joined with eval/sequences.jsonl
    samples    one generated text per row                  eval/samples.jsonl joined with eval/sequences.jsonl
    tasks      one figure of a benchmark task per row      eval/tasks.jsonl
    tokens     one token per row, with `--per-token`       eval/tokens.parquet joined with eval/sequences.jsonl

Whole numbers are the nullable `Int64`. `data` is "" for a run's own data, `settings` is "" if none was changed, `by`
and `twin` are "" if a figure has none. `evaluation` names what was evaluated: the run, with its data, step and settings
where the run alone would not tell.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looped.errors import UserError, did_you_mean
from looped.evaluation.benchmarks import TaskRow
from looped.evaluation.metric_rows import Row
from looped.evaluation.result_files import EXAMPLES, IDENTITY, ROWS, SAMPLES, SEQUENCES, TASKS, Line
from looped.evaluation.token_losses import TOKENS, pandas_for

if TYPE_CHECKING:
    from pandas import DataFrame

FILES = {"figures": ROWS, "examples": EXAMPLES, "samples": SAMPLES, "tasks": TASKS, "tokens": TOKENS}
"""Table -> the file it is read from."""
FLAGS = {"tasks": " --tasks NAME", "tokens": " --per-token"}
"""Table -> the option of `looped eval` that writes it."""
FIRST, LAST = ("run", "data", "step", "settings"), ("device", "dtype")
WHOLE = ("step", "depth", "difficulty", "n", "clusters", "trajectories", "peak_bytes", "num_fewshot", "limit",
         "sequence")
"""Columns of whole numbers."""
REAL = ("mean", "ci_low", "ci_high", "sigma", "temperature", "seconds", "layer_forwards", "evaluations", "stderr",
        "value")
COLUMNS = {"figures": [field.name for field in fields(Row)],
           "examples": ["metric", "depth", "difficulty", "by", "twin", "trajectories", "sequence", "value"],
           "samples": ["depth", "sequence", "prompt", "text"],
           "tasks": ["task", *(field.name for field in fields(TaskRow) if field.name != "task")]}
"""Table -> the columns it always has, between `FIRST` and `LAST`; further keys of its lines come after them."""


def read_results(runs: str | Path | Iterable[str | Path], table: str = "figures") -> "DataFrame":
    """Results of `looped eval` for one run folder or several, as a tidy table: all checkpoints, settings and data
    (those below other/ too). Rows of one run differ in these, so a table by depth has one column per `evaluation`:
    `figures.pivot(index="depth", columns="evaluation", values="mean")` for one metric, where `pivot_table` by run would
    average over texts.

    table: "figures" (one per row), "examples" (each held-out sequence, problem or image by metric and depth, with its
    ids), "samples" (generated texts), "tasks" (of lm-evaluation-harness), or "tokens" (of `--per-token`).
    Raises UserError if a run has no such results, if a file is damaged, and if pandas is missing.
    """
    pandas = pandas_for("read_results")
    if table not in FILES:
        raise UserError(f"read_results has no table '{table}'{did_you_mean(table, FILES)}")
    listed = [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    if table == "tokens":
        return _named(pandas.concat([_tokens(run, folder) for run in listed for folder in _folders(run, table)],
                                    ignore_index=True))
    lines = [line for run in listed for line in _lines(run, table)]
    names = [*FIRST, *COLUMNS[table], *LAST]
    own = [name for name in dict.fromkeys(name for line in lines for name in line) if name not in names]
    frame = pandas.DataFrame(lines, columns=[*names, *own])
    types = dict.fromkeys(WHOLE, "Int64") | dict.fromkeys(REAL, "float64")
    frame = frame.astype({name: kind for name, kind in types.items() if name in names})
    frame = frame.assign(**{name: frame[name].convert_dtypes() for name in own},
                         **{name: frame[name].fillna("") for name in ("by", "twin") if name in frame})
    return _named(frame)


def _named(frame: "DataFrame") -> "DataFrame":
    """The table with the column `evaluation`."""
    several = frame.groupby("run")["step"].transform("nunique") > 1
    keys = zip(frame["run"], frame["data"], frame["step"], frame["settings"], several, strict=True)
    names = [", ".join(filter(None, [run, data, f"step {step}" if many else "", settings]))
             for run, data, step, settings, many in keys]
    return frame.assign(evaluation=names)


def _folders(run: Path, table: str) -> list[Path]:
    """The folders of a run that contain a table: its own, and those of other data. Raises UserError if there is none.
    """
    name = FILES[table]
    folders = [folder for folder in (run, *sorted((run / "other").glob("*"))) if (folder / name).is_file()]
    if not folders and (run / "compare.jsonl").is_file():
        raise UserError(f"{run} is the folder of a comparison, whose figures are the lines of {run / 'compare.jsonl'}; "
                        f"read them with pandas.read_json(path, lines=True)")
    if not folders:
        raise UserError(f"{run} has no {name}; measure it with looped eval {run}{FLAGS.get(table, '')}")
    return folders


def _tokens(run: Path, folder: Path) -> "DataFrame":
    """The tokens of a folder with the ids of their sequences."""
    pandas = pandas_for("read_results")
    try:
        found = pandas.read_parquet(folder / TOKENS)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / TOKENS} is damaged ({error}); rebuild it with looped eval --per-token") from None
    ids = [dict(zip(IDENTITY, key, strict=False)) | {"sequence": number} | line
           for key, lines in _ids(folder).items() for number, line in enumerate(lines)]
    if ids:
        strings = ["settings", "data", "run"]
        ids = pandas.DataFrame(ids)
        ids[strings] = ids[strings].astype(object).fillna("").astype(str)
        found = found.merge(ids, how="left", on=[*IDENTITY, "sequence"])
    return found.assign(run=found["run"].where(found["run"] != "", str(run)))


def _lines(run: Path, table: str) -> list[Line]:
    """The lines of a table of one run. Raises UserError if there is none."""
    name, folders = FILES[table], _folders(run, table)
    read = {"examples": _examples, "samples": _samples}.get(table, _figures)
    return [{"run": str(run), "data": "", "settings": ""} | line for folder in folders for line in read(folder, name)]


def _figures(folder: Path, name: str) -> list[Line]:
    return _read(folder / name)


def _examples(folder: Path, name: str) -> Iterator[Line]:
    """Each value with its ids. A metric without a depth in eval/depth.jsonl has none here either."""
    known, rows = _ids(folder), _read_if_there(folder / ROWS)
    by_depth = {(_key(row), row["metric"]) for row in rows if "depth" in row}
    without_depth = {(_key(row), row["metric"]) for row in rows} - by_depth
    for line in _read(folder / name):
        left_out = ("values", "depth") if (_key(line), line["metric"]) in without_depth else ("values",)
        plain = {key: value for key, value in line.items() if key not in left_out}
        ids = known.get((*_key(line), line.get("difficulty")), ())
        for number, value in enumerate(line["values"]):
            yield plain | {"sequence": number, "value": value} | (ids[number] if number < len(ids) else {})


def _samples(folder: Path, name: str) -> Iterator[Line]:
    """Each text with the ids of the sequence its prompt is taken from."""
    known = _ids(folder)
    for line in _read(folder / name):
        ids, number = known.get((*_key(line), None), ()), line.get("sequence", -1)
        yield line | (ids[number] if 0 <= number < len(ids) else {})


def _ids(folder: Path) -> dict[tuple, list[Line]]:
    """(identity, difficulty) -> the ids of each held-out example, in order; none if the evaluation wrote none."""
    return {(*_key(line), line.get("difficulty")): _each(line) for line in _read_if_there(folder / SEQUENCES)}


def _each(line: Line) -> list[Line]:
    """The ids in one line, split by example: a list has one value per example, anything else applies to all."""
    own = {name: value for name, value in line.items() if name not in (*FIRST, *LAST, "difficulty")}
    lists = {name: value for name, value in own.items() if isinstance(value, list)}
    return [own | dict(zip(lists, each, strict=True)) for each in zip(*lists.values(), strict=True)]


def _key(line: Mapping[str, Any]) -> tuple:
    return tuple(line.get(name) for name in IDENTITY)


def _read_if_there(path: Path) -> Sequence[Line]:
    return _read(path) if path.is_file() else ()


def _read(path: Path) -> list[Line]:
    """The lines of a file. Raises UserError if one is damaged."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        lines = [None]
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path} is damaged; rebuild it with looped eval")
    return lines
