"""What an evaluation leaves behind: JSON lines in the run's folder, tables in Markdown, pictures.

    runs/<name>/eval/depth.jsonl     one row a figure: {depth, metric, mean, ci_low, ci_high, n, ...}
    runs/<name>/eval/examples.jsonl  the figure of every held-out sequence, for paired comparisons
    runs/<name>/eval/samples.jsonl   prompts and their continuations at each depth
    runs/<name>/eval/probes.jsonl    with --probes: their figures, and what is out of order
    runs/<name>/plots/depth.png      the depth curve; sigma.png the loss by noise level; partition.png which of several
                                     blocks has which levels
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from looped.config import Config, load_config
from looped.diffusion.noise import noise_from_config
from looped.errors import UserError, did_you_mean
from looped.evaluation.depth import Evaluation
from looped.evaluation.mauve import ENOUGH
from looped.evaluation.plots import Curve, plot_depth, plot_sigma
from looped.evaluation.plots_blocks import plot_mask_partition, plot_partition
from looped.evaluation.probes import Probes
from looped.objectives.depth import trained_depths

ROWS, EXAMPLES, SAMPLES = "eval/depth.jsonl", "eval/examples.jsonl", "eval/samples.jsonl"
PROBES = "eval/probes.jsonl"

Rows = Sequence[Mapping[str, Any]]


MAIN = ("nats_per_token", "accuracy", "frechet_distance")
"""The figure that an evaluation is about: of text, of images that are named, or of images that are made."""
BY_LEVEL = ("nats_at_sigma", "loss_at_sigma")
"""Figures by noise level."""


def save_evaluation(run: Path, evaluation: Evaluation, config: Config, *, about: Mapping[str, Any],
                    probes: Probes | None = None) -> None:
    """Write everything of an evaluation into the folder of a run. `about`: what all lines say: the `step` of the
    checkpoint, `device` and `dtype`, and of other data than the run's their name (`data`). Raises UserError."""
    rows = [{**about, **row.as_dict()} for row in evaluation.rows]
    examples = [{**about, "metric": metric, "depth": depth, "values": values.tolist()}
                for metric, by_depth in evaluation.per_example.items() for depth, values in by_depth.items()]
    files = {ROWS: rows, EXAMPLES: examples, SAMPLES: evaluation.samples}
    if probes is not None:
        files[PROBES] = [{**about, **row.as_dict()} for row in probes.rows]
        files[PROBES] += [{**about, "verdict": sentence} for sentence in probes.sentences]
    write_lines(run, files)
    try:
        main = next(metric for metric in MAIN if any(row["metric"] == metric for row in rows))
        plot_depth([_curve(run.name, rows, config, main)], run / "plots" / "depth.png")
        if any("sigma" in row for row in rows):
            plot_sigma({run.name: [row for row in rows if row["metric"] in BY_LEVEL]},
                       run / "plots" / "sigma.png")
        picture_blocks(run, config)
    except OSError as error:
        raise cannot_write(run, error) from None


def picture_blocks(run: Path, config: Config) -> None:
    """plots/partition.png of a run whose blocks have noise levels of their own."""
    path = run / "plots" / "partition.png"
    if config.objective == "blockwise":
        plot_partition(config.blocks, noise_from_config(config.denoise.noise), path)
    elif config.objective == "masked" and config.blocks.num > 1:
        plot_mask_partition(config.blocks, config.masked.schedule, path)


def write_lines(run: Path, files: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """JSON lines into files of a run's folder, which gets the folders for them and for pictures. Raises UserError."""
    try:
        for folder in ("eval", "plots"):
            (run / folder).mkdir(parents=True, exist_ok=True)
        for name, lines in files.items():
            (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise cannot_write(run, error) from None


def cannot_write(run: Path, error: OSError) -> UserError:
    """The sentence for a folder that refuses."""
    return UserError(f"cannot write the evaluation to {run}: {error.strerror or error}; free space or permissions")


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows that `looped eval` left in a run's folder. Raises UserError."""
    path = run / ROWS
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows or not all(isinstance(row, dict) and "metric" in row for row in rows):
            raise ValueError
    except OSError:
        raise UserError(f"{run} has no {ROWS}; measure it with looped eval {run}") from None
    except ValueError:
        raise UserError(f"{path} is damaged; write it anew with looped eval {run}") from None
    return rows


def plot_runs(runs: Sequence[Path], out: Path, *, metric: str = "nats_per_token") -> str:
    """Depth curves of several runs in one picture; the table, which is also written beside it. Raises UserError."""
    rows = {_label(run, runs): read_rows(run) for run in runs}
    known = {row["metric"] for each in rows.values() for row in each if "depth" in row}
    if metric not in known:
        raise UserError(f"metric '{metric}' is not among the figures by depth{did_you_mean(metric, known)}")
    curves = [_curve(label, each, load_config(run / "config.yaml"), metric)
              for run, (label, each) in zip(runs, rows.items(), strict=True)]
    table = depth_table(rows)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        plot_depth(curves, out)
        out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}; choose another --out"
                        ) from None
    return table


def _label(run: Path, runs: Sequence[Path]) -> str:
    """The folder's name, or its whole path where two runs share a name."""
    return str(run) if [other.name for other in runs].count(run.name) > 1 else run.name


def _curve(label: str, rows: Rows, config: Config, metric: str) -> Curve:
    return Curve(label=label, rows=[row for row in rows if row["metric"] == metric and "depth" in row],
                 trained=trained_depths(config), metric=metric)


def depth_table(runs: Mapping[str, Rows]) -> str:
    """Markdown: one line a run and depth, only columns that hold something; below, what has no depth or needs words."""
    lines, notes = [], []
    for label, rows in runs.items():
        at = {(row["metric"], row.get("depth")): row for row in rows}
        for depth in sorted({row["depth"] for row in rows if "depth" in row}):
            mine = {metric: row for (metric, at_depth), row in at.items() if at_depth == depth}
            if not mine.keys().isdisjoint(MAIN):
                lines.append({"run": label, "depth": str(depth), **_cells(mine)})
        notes += _notes(label, at)
    header = [name for name in lines[0] if any(line[name] != "-" for line in lines)] if lines else ["run", "depth"]
    return "\n".join([markdown_table(header, ([line[name] for name in header] for line in lines)),
                      *("\n" + note for note in notes)])


def _cells(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The columns of a depth, out of its figures by metric."""
    def mean(metric: str, digits: int = 3) -> str:
        return _number(rows.get(metric, {}).get("mean"), digits)

    nats, accuracy, frechet = (rows.get(metric, {}) for metric in MAIN)
    main = nats or accuracy or frechet
    return {"nats a token": _with_interval(nats), "accuracy": _with_interval(accuracy),
            "Fréchet distance": mean("frechet_distance"), "precision": mean("precision"), "recall": mean("recall"),
            "bits a byte": mean("bits_per_byte"),
            "distinct-1, 2, 4": " ".join(mean(f"distinct_{n}") for n in (1, 2, 4)).replace("- - -", "-"),
            "repetition-4": mean("repetition_4"), "judged": mean("judged_nats"), "matched": _matched(rows),
            "mauve": mean("mauve"), "tokens a second": mean("tokens_per_second", 0),
            "layer forwards": _number(main.get("layer_forwards"), 0), "seconds": _number(main.get("seconds"), 2)}


def _matched(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """`+3.1 % [0.9, 5.2] at 0.93`: perplexity beside the twin's, and the temperature that levels their diversity."""
    if "matched_perplexity_percent" not in rows:
        return "out of reach" if "unmatched_distinct_2" in rows else "-"
    row = rows["matched_perplexity_percent"]
    return f"{row['mean']:+.1f} % [{row['ci_low']:.1f}, {row['ci_high']:.1f}] at {row['temperature']:.2f}"


def _notes(label: str, at: Mapping[tuple[str, int | None], Mapping[str, Any]]) -> Iterator[str]:
    """Sentences about the figures that have no depth, or that say little without their circumstances."""
    first = {metric: row for (metric, _), row in reversed(at.items())}
    if "nats_at_sigma_max" in first:
        yield (f"{label} at sigma_max, where a denoiser is a next-token predictor: "
               f"{_with_interval(first['nats_at_sigma_max'])} nats a token")
    if "nats_bound" in first:
        nats, bits = (_with_interval(first[metric]) for metric in ("nats_bound", "bits_per_byte_bound"))
        yield f"{label} with ever more unmasking steps: a bound of {nats} nats a token, {bits} bits a byte"
    if "frechet_distance" in first:
        row = first["frechet_distance"]
        yield (f"{label}: Fréchet distance, precision and recall in features of {row['by']}: not Inception FID; of "
               f"{row['n']} images made, against the held-out ones. Layer forwards are those of one image.")
    if "judged_nats_of_text" in first:
        row = first["judged_nats_of_text"]
        yield (f"judged: nats a token of {row['n']} samples under {row.get('by', 'the judge')}, which gives the real "
               f"text after the prompts of {label} {_with_interval(row)}")
    if "twin_distinct_2" in first:
        row = first["twin_distinct_2"]
        theirs = first["twin_judged_nats"]
        yield (f"matched: perplexity beside that of {row['by']}, whose samples have {theirs['mean']:.3f} nats a token, "
               f"at the temperature where {label} has their distinct-2, {row['mean']:.3f}")
    for (metric, depth), row in at.items():
        if metric == "unmatched_distinct_2":
            yield (f"out of reach: at depth {depth} {label} comes no nearer to that distinct-2 than {row['mean']:.3f}, "
                   f"at temperature {row['temperature']:.2f}")
    if "mauve" in first:
        row = first["mauve"]
        few = ", which are too few to mean much: the authors advise thousands" if row["n"] < ENOUGH else ""
        yield f"mauve: with the features of {row['by']}, from {row['n']} samples of {label} and as many texts{few}"


def _with_interval(row: Mapping[str, Any]) -> str:
    """`3.604 [3.570, 3.641]`, the mean with its 95 % interval."""
    return f"{row['mean']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]" if row else "-"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table that reads well as plain text too: the first column to the left, figures to the right."""
    lines = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                              for i, (cell, w) in enumerate(zip(line, widths, strict=True))) + " |" for line in lines]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def level_table(rows: Rows) -> str:
    """Markdown: the held-out loss of a run that makes images, over all levels and of each block, then by level."""
    lines = [[row.get("by", "all"), f"{row['sigma']:.3g}" if "sigma" in row else "as trained", _with_interval(row)]
             for row in rows if row["metric"] in ("heldout_loss", "loss_at_sigma")]
    return markdown_table(["block", "noise level", "held-out loss"], lines)
