"""Tables and plots of evaluated runs, from the rows that `looped.evaluation.result_files` keeps.

    runs/<name>/plots/depth.png      the depth curve; sigma.png: the loss by noise level; partition.png: the noise
                                     levels of each block
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looped.config import Config, load_config
from looped.diffusion.noise_from_config import noise_from_config
from looped.errors import UserError, did_you_mean
from looped.evaluation.mauve import ENOUGH
from looped.evaluation.plots import Curve, plot_depth, plot_sigma
from looped.evaluation.plots_blocks import plot_mask_partition, plot_partition
from looped.evaluation.result_files import IDENTITY, ROWS, EvaluationFiles, read_rows, writing_to
from looped.objectives import trained_depths
from looped.reports.markdown import markdown
from looped.reports.sections import Prose, Section, Table

Rows = Sequence[Mapping[str, Any]]

TABLED = ("nats_per_token", "accuracy", "frechet_distance")
"""Metrics whose table has dedicated columns."""
BY_LEVEL = ("nats_at_sigma", "loss_at_sigma")
"""Metrics by noise level."""
VARIANTS = ("difficulty", "by", "twin", "trajectories")
"""Keys that distinguish curves of the same metric and evaluation."""
COMPARED = ("nats_by_solver", "judged_nats", "judged_nats_of_text", "matched_perplexity_percent", "mauve",
            "twin_judged_nats", "frechet_distance", "precision", "recall")
"""Metrics of the table that depend on a judge, a baseline, features or a number of trajectories."""


def draw_evaluation(files: EvaluationFiles, config: Config, name: str) -> None:
    """Draw the plots of everything measured for a checkpoint. Raises UserError."""
    rows, plots = files.read(ROWS), files.folder / "plots"
    with writing_to(files.folder), files.lock():
        measured = Measured(name, name, rows, trained_depths(config), config.kind.metric)
        plot_depth(_curves(measured, measured.main), plots / "depth.png")
        if any("sigma" in row for row in rows):
            plot_sigma({name: [row for row in rows if row["metric"] in BY_LEVEL]}, plots / "sigma.png")
        picture_blocks(files.folder, config)


PARTITIONS: dict[str, Callable[[Config, Path], None]] = {
    "solver": lambda config, path: plot_partition(config.blocks, noise_from_config(config.denoise.noise), path),
    "unmask": lambda config, path: plot_mask_partition(config.blocks, config.masked.schedule, path)}
"""Rollout -> function that plots the levels of each block."""


def picture_blocks(run: Path, config: Config) -> None:
    """Draw plots/partition.png if the blocks of the run have their own noise levels."""
    draw = PARTITIONS.get(config.rule.rollout)
    if draw is not None and config.blocks.num > 1:
        draw(config, run / "plots" / "partition.png")


# ---- runs side by side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One evaluation of a run: `rows` of one checkpoint and one set of settings, and `trained`, the range of trained
    depths. `label` is unique to it, `run` to its run. `main`: the main metric of the run."""

    label: str
    run: str
    rows: Rows
    trained: tuple[int, int]
    main: str


def plot_runs(runs: Sequence[str | Path], out: str | Path, *, metric: str | None = None) -> str:
    """Plot curves of several runs together, over depth, or over the noise level if the metric has no depth. Returns the
    table, which is also written next to the plot.

    metric: the main metric of the runs if None. Each checkpoint, each change of settings and each difficulty has its
    own curve. Raises UserError.
    """
    runs, out = [Path(run) for run in runs], Path(out)
    measured = [each for run in runs for each in _evaluations(run, runs)]
    chosen = _main_metric(measured) if metric is None else metric
    place = _place(chosen, measured)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        table = markdown((_draw_depth if place == "depth" else _draw_sigma)(measured, chosen, out))
        out.with_suffix(".md").write_text(table + "\n", encoding="utf-8", newline="")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}; choose another --out"
                        ) from None
    return table


def _evaluations(run: Path, runs: Sequence[Path]) -> Iterator[Measured]:
    """The rows of a run, split by checkpoint and settings; the labels name these if there are several."""
    apart: dict[tuple, list] = {}
    for row in read_rows(run):
        apart.setdefault(tuple(row.get(name) for name in IDENTITY), []).append(row)
    config, name = load_config(run / "config.yaml"), _label(run, runs)
    several = [len(set(values)) > 1 for values in zip(*apart, strict=True)]
    for (step, changed, data, of), rows in apart.items():
        parts = (f"step {step}", changed or "settings of training", f"on {data or 'its own data'}", of or str(run))
        said = [name, *(part for part, differs in zip(parts, several, strict=True) if differs)]
        yield Measured(", ".join(said), name, rows, trained_depths(config), config.kind.metric)


def _label(run: Path, runs: Sequence[Path]) -> str:
    """The folder's name, or its whole path if two runs share a name."""
    return str(run) if [other.name for other in runs].count(run.name) > 1 else run.name


def _main_metric(measured: Sequence[Measured]) -> str:
    """The main metric of all runs. Raises UserError if they have different ones."""
    about = {each.run: each.main for each in measured}
    if len(set(about.values())) > 1:
        raise UserError("the runs have different main metrics ("
                        + ", ".join(f"{run}: {metric}" for run, metric in about.items())
                        + "); choose one with --metric")
    return next(iter(about.values()))


def _place(metric: str, measured: Sequence[Measured]) -> str:
    """The axis of a metric, `depth` or `sigma`. Raises UserError if it has neither or does not exist."""
    rows = [row for each in measured for row in each.rows]
    for place in ("depth", "sigma"):
        if any(row["metric"] == metric and place in row for row in rows):
            return place
    if any(row["metric"] == metric for row in rows):
        raise UserError(f"metric '{metric}' is a single value without depth or noise level; read it in {ROWS}")
    known = {row["metric"] for row in rows if "depth" in row or "sigma" in row}
    raise UserError(f"metric '{metric}' is not among the metrics by depth{did_you_mean(metric, known)}")


def _draw_depth(measured: Sequence[Measured], metric: str, out: Path) -> list[Section]:
    curves = [curve for each in measured for curve in _curves(each, metric)]
    plot_depth(curves, out)
    if metric in (*TABLED, "bits_per_byte"):
        return depth_table({each.label: each.rows for each in measured})
    return [figure_table(metric, {curve.label: curve.rows for curve in curves}, "depth")]


def _draw_sigma(measured: Sequence[Measured], metric: str, out: Path) -> list[Section]:
    rows = {each.label: [row for row in each.rows if row["metric"] == metric] for each in measured}
    rows = {label: each for label, each in rows.items() if each}
    plot_sigma(rows, out)
    return [figure_table(metric, rows, "sigma")]


def _curves(measured: Measured, metric: str) -> list[Curve]:
    """One curve per difficulty, and per value of any other key that varies within the metric."""
    rows = [row for row in measured.rows if row["metric"] == metric and "depth" in row]
    apart: dict[tuple, list] = {}
    for row in rows:
        apart.setdefault(tuple(row.get(name) for name in VARIANTS), []).append(row)
    varying = [name for place, name in enumerate(VARIANTS)
               if name == "difficulty" or len({variant[place] for variant in apart}) > 1]
    return [Curve(", ".join([measured.label, *_variant(each[0], varying)]), sorted(each, key=lambda row: row["depth"]),
                  measured.trained, metric, measured.run)
            for _, each in sorted(apart.items(), key=lambda item: [(v is not None, v) for v in item[0]])]


def _variant(row: Mapping[str, Any], varying: Sequence[str]) -> list[str]:
    """The parts of a curve's label after its run: `difficulty 4`, or the name of a judge or an exit."""
    return [str(row[name]) if name in ("by", "twin") else f"{name} {row[name]}" for name in varying if name in row]


def figure_table(metric: str, curves: Mapping[str, Rows], place: str) -> Table:
    """One line per curve, one column per depth (or sigma, as `place` says) of one metric."""
    columns = sorted({row[place] for rows in curves.values() for row in rows}, reverse=place == "sigma")
    lines = []
    for label, rows in curves.items():
        at = {row[place]: row for row in rows}
        lines.append([label, *(_with_interval(at.get(column, {})) for column in columns)])
    return Table([metric, *(f"{place} {column:g}" for column in columns)], lines)


# ---- tables ----------------------------------------------------------------------------------------------------------


def depth_table(runs: Mapping[str, Rows]) -> list[Section]:
    """One line per run and depth, and per judge, baseline or number of trajectories where there are several, with
    non-empty columns only; below, sentences for metrics that have no depth or need an explanation."""
    lines, notes = [], []
    for label, rows in (part for run in runs.items() for part in _by_variant(*run)):
        at = {(row["metric"], row.get("depth")): row for row in rows}
        for depth in sorted({row["depth"] for row in rows if "depth" in row}):
            mine = {metric: row for (metric, at_depth), row in at.items() if at_depth == depth}
            if not mine.keys().isdisjoint(TABLED):
                lines.append({"run": label, "depth": str(depth), **_cells(mine)})
        notes += _notes(label, at)
    if not lines:  # a custom metric
        metrics = dict.fromkeys(row["metric"] for rows in runs.values() for row in rows if "depth" in row)
        return [figure_table(metric, {label: [row for row in rows if row["metric"] == metric and "depth" in row]
                                      for label, rows in runs.items()}, "depth") for metric in metrics]
    header = [name for name in lines[0] if any(line[name] != "-" for line in lines)] if lines else ["run", "depth"]
    return [Table(header, [[line[name] for name in header] for line in lines]), *map(Prose, notes)]


def _by_variant(label: str, rows: Rows) -> Iterator[tuple[str, Rows]]:
    """(label, rows) of each line of a run: all rows, or, where a compared metric was measured in several ways, those of
    one way and all rows of the metrics that were measured in one."""
    ways: dict[str, dict[tuple, Mapping[str, Any]]] = {}
    for row in rows:
        if row["metric"] in COMPARED:
            ways.setdefault(row["metric"], {})[tuple(row.get(name) for name in VARIANTS)] = row
    ways = {metric: apart for metric, apart in ways.items() if len(apart) > 1}
    shared = [row for row in rows if row["metric"] not in ways]
    if not ways:
        yield label, shared
    varying = [name for name in VARIANTS if any(len({row.get(name) for row in apart.values()}) > 1
                                                for apart in ways.values())]
    for way in dict.fromkeys(way for apart in ways.values() for way in apart):
        own = [row for row in rows if row["metric"] in ways and tuple(row.get(name) for name in VARIANTS) == way]
        depths = {row.get("depth") for row in own} | {None}
        yield ", ".join([label, *_variant(own[0], varying)]), [
            *own, *(row for row in shared if row.get("depth") in depths or depths == {None})]


def _cells(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The cells of one depth, from its rows by metric."""
    def mean(metric: str, digits: int = 3) -> str:
        return _number(rows.get(metric, {}).get("mean"), digits)

    nats, accuracy, frechet = (rows.get(metric, {}) for metric in TABLED)
    main = nats or accuracy or frechet
    return {"nats/token": _with_interval(nats), "by solver": _with_interval(rows.get("nats_by_solver", {})),
            "accuracy": _with_interval(accuracy),
            "Fréchet distance": mean("frechet_distance"), "precision": mean("precision"), "recall": mean("recall"),
            "bits/byte": mean("bits_per_byte"),
            "distinct-1, 2, 4": " ".join(mean(f"distinct_{n}") for n in (1, 2, 4)).replace("- - -", "-"),
            "repetition-4": mean("repetition_4"), "judged": mean("judged_nats"), "matched": _matched(rows),
            "mauve": mean("mauve"), "tokens/s": mean("tokens_per_second", 0),
            "layer forwards": _number(main.get("layer_forwards"), 0), "seconds": _number(main.get("seconds"), 2)}


def _matched(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """`+3.1 % [0.9, 5.2] at 0.93`: perplexity relative to the baseline's, and the temperature that equalises
    diversity."""
    if "matched_perplexity_percent" not in rows:
        return "out of reach" if "unmatched_distinct_2" in rows else "-"
    row = rows["matched_perplexity_percent"]
    interval = f" [{row['ci_low']:.1f}, {row['ci_high']:.1f}]" if "ci_low" in row else ""
    return f"{row['mean']:+.1f} %{interval} at {row['temperature']:.2f}"


def _notes(label: str, at: Mapping[tuple[str, int | None], Mapping[str, Any]]) -> Iterator[str]:
    """Sentences about the metrics that have no depth, or that need an explanation."""
    first = {metric: row for (metric, _), row in reversed(at.items())}
    if "nats_at_sigma_max" in first:
        yield (f"{label} at sigma_max, where a denoiser is a next-token predictor: "
               f"{_with_interval(first['nats_at_sigma_max'])} nats/token")
    if "nats_by_solver" in first:
        yield (f"by solver: nats/token of the configured solver of {label} itself, under the mean prediction of "
               f"{first['nats_by_solver']['trajectories']} trajectories: an upper bound, which more of them lower")
    if "nats_bound" in first:
        nats, bits = (_with_interval(first[metric]) for metric in ("nats_bound", "bits_per_byte_bound"))
        yield f"{label} in the limit of many unmasking steps: a bound of {nats} nats/token, {bits} bits/byte"
    if "frechet_distance" in first:
        row = first["frechet_distance"]
        yield (f"{label}: Fréchet distance, precision and recall in features of {row['by']}: not Inception FID; "
               f"{row['n']} generated images against the held-out ones. Layer forwards are per image.")
    if "frechet_distance_of_training" in first:
        row = first["frechet_distance_of_training"]
        yield (f"for reference: {row['n']} training images with the same classes as the held-out ones have a Fréchet "
               f"distance of {row['mean']:.3f} to them")
    if "judged_nats_of_text" in first:
        row = first["judged_nats_of_text"]
        yield (f"judged: nats/token of {row['n']} samples under {row.get('by', 'the judge')}; the real text after "
               f"the prompts of {label} has {_with_interval(row)}")
    if "twin_distinct_2" in first:
        row = first["twin_distinct_2"]
        theirs = first["twin_judged_nats"]
        twin = row.get("twin", row.get("by"))
        yield (f"matched: perplexity relative to {twin}, whose samples have {theirs['mean']:.3f} nats/token, at the "
               f"temperature at which {label} has the same distinct-2, {row['mean']:.3f}")
    for (metric, depth), row in at.items():
        if metric == "unmatched_distinct_2":
            yield (f"out of reach: at depth {depth} the closest distinct-2 of {label} is {row['mean']:.3f}, at "
                   f"temperature {row['temperature']:.2f}")
    if "mauve" in first:
        row = first["mauve"]
        few = ", too few to be reliable: the authors recommend thousands" if row["n"] < ENOUGH else ""
        yield f"mauve: in features of {row['by']}, from {row['n']} samples of {label} and as many real texts{few}"


def _with_interval(row: Mapping[str, Any]) -> str:
    """`3.604 [3.570, 3.641]`, the mean with its 95 % interval, if it has one."""
    if not row:
        return "-"
    interval = f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]" if "ci_low" in row else ""
    return f"{row['mean']:.3f}{interval}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def level_table(rows: Rows) -> Table:
    """The held-out loss of an image generator: over all noise levels, of each block, and by level."""
    lines = [[row.get("by", "all"), f"{row['sigma']:.3g}" if "sigma" in row else "as trained", _with_interval(row)]
             for row in rows if row["metric"] in ("heldout_loss", "loss_at_sigma")]
    return Table(["block", "noise level", "held-out loss"], lines)
