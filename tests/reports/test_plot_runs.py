"""`looped plot`: a curve and a line of the table for each difficulty, checkpoint and setting, over depth or noise."""

import json

import pytest

from looped.cli import main
from looped.config import dump_config, load_config
from looped.errors import UserError
from looped.reports import runs
from looped.reports.runs import plot_runs

TASK = {"task.name": "prefix-sums", "denoise.context": "inject"}
IMAGES = {"images.source": "digits", "model.patch_size": 4, "denoise.context": "inject"}
MAKES = IMAGES | {"images.goal": "generate", "model.num_prelude_layers": 0, "model.num_coda_layers": 0,
                  "model.injection": "none"}


def row(metric, mean, depth=None, **fields):
    place = {} if depth is None else {"depth": depth}
    return {"step": 6, "metric": metric, "mean": mean, "ci_low": mean - 0.1, "ci_high": mean + 0.1, "n": 8, **place,
            **fields}


SOLVED = [row(metric, (10 * level + depth) / 100, depth, difficulty=level)
          for level in (2, 4) for depth in (4, 1) for metric in ("solved", "cells")]
EXITS = [row("steps_used", 3.0, 8, difficulty=level, by=by) for level in (2, 4) for by in ("kl=0.001", "answer=3")]
LOSSES = [row("nats_per_token", 3.0, 1), row("bits_per_byte", 1.5, 1), row("nats_at_sigma", 2.0, sigma=0.5),
          row("nats_at_sigma", 4.0, sigma=20.0), row("nats_bound", 2.5), row("bits_per_byte_bound", 1.2),
          row("distinct_2", 0.5, 1)]
MADE = [row("frechet_distance", 9.0, 4, by="pixels"), row("precision", 0.5, 4, by="pixels")]


def run_of(folder, rows, settings):
    (folder / "eval").mkdir(parents=True)
    (folder / "eval/depth.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (folder / "config.yaml").write_text(dump_config(load_config(None, settings)))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The curves of each picture that is drawn, as {label: [(depth, mean), ...]}."""
    found, draw = [], runs.plot_depth

    def watched(curves, path):
        found.append({curve.label: [(each["depth"], each["mean"]) for each in curve.rows] for curve in curves})
        draw(curves, path)

    monkeypatch.setattr(runs, "plot_depth", watched)
    return found


def test_folders_may_be_strings(tmp_path, drawn):
    folder = run_of(tmp_path / "a", SOLVED, TASK)
    assert plot_runs([str(folder)], str(tmp_path / "x.png")) == plot_runs([folder], tmp_path / "y.png")
    assert drawn[0] == drawn[1]
    assert (tmp_path / "x.md").read_text() == (tmp_path / "y.md").read_text()


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize("metric", ["solved", "cells", None])
def test_each_difficulty_has_a_curve_and_a_line(metric, drawn, tmp_path):
    table = plot_runs([run_of(tmp_path / "a", SOLVED, TASK)], tmp_path / "x.png", metric=metric)
    assert drawn == [{"a, difficulty 2": [(1, 0.21), (4, 0.24)], "a, difficulty 4": [(1, 0.41), (4, 0.44)]}]
    header, _, *lines = cells(table)
    assert header == [metric or "solved", "depth 1", "depth 4"]  # without a metric, what the run is about
    assert lines == [["a, difficulty 2", "0.210 [0.110, 0.310]", "0.240 [0.140, 0.340]"],
                     ["a, difficulty 4", "0.410 [0.310, 0.510]", "0.440 [0.340, 0.540]"]]
    assert (tmp_path / "x.md").read_text() == table + "\n"
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_exits_of_a_metric_are_apart(drawn, tmp_path):
    plot_runs([run_of(tmp_path / "a", [*SOLVED, *EXITS], TASK)], tmp_path / "x.png", metric="steps_used")
    assert list(drawn[0]) == ["a, difficulty 2, answer=3", "a, difficulty 2, kl=0.001", "a, difficulty 4, answer=3",
                              "a, difficulty 4, kl=0.001"]


def test_checkpoints_and_settings_are_not_mixed_in_a_curve(drawn, tmp_path):
    later = [each | {"step": 9, "mean": 0.9} for each in SOLVED if each["difficulty"] == 2]
    changed = [each | {"settings": "denoise.solver=heun"} for each in later]
    plot_runs([run_of(tmp_path / "a", [*SOLVED, *later], TASK)], tmp_path / "x.png")
    assert list(drawn[-1]) == ["a, step 6, difficulty 2", "a, step 6, difficulty 4", "a, step 9, difficulty 2"]
    plot_runs([run_of(tmp_path / "b", [*later, *changed], TASK)], tmp_path / "x.png")
    assert list(drawn[-1]) == ["b, settings of training, difficulty 2", "b, denoise.solver=heun, difficulty 2"]
    assert all(len(curve) == 2 for curves in drawn for curve in curves.values())


@pytest.mark.parametrize(("rows", "settings", "metric", "header", "line"), [
    (LOSSES, {}, None, ["run", "depth", "nats/token"], ["a", "1", "3.000 [2.900, 3.100]"]),
    (LOSSES, {}, "distinct_2", ["distinct_2", "depth 1"], ["a", "0.500 [0.400, 0.600]"]),
    (LOSSES, {}, "nats_at_sigma", ["nats_at_sigma", "sigma 20", "sigma 0.5"],
     ["a", "4.000 [3.900, 4.100]", "2.000 [1.900, 2.100]"]),
    (MADE, MAKES, None, ["run", "depth", "Fréchet distance"], ["a", "4", "9.000"]),
    (MADE, MAKES, "precision", ["precision", "depth 4"], ["a", "0.500 [0.400, 0.600]"]),
    ([row("accuracy", 0.5, 2)], IMAGES, None, ["run", "depth", "accuracy"], ["a", "2", "0.500 [0.400, 0.600]"]),
], ids=str)
def test_a_metric_has_its_table(rows, settings, metric, header, line, tmp_path):
    found, _, first, *_ = cells(plot_runs([run_of(tmp_path / "a", rows, settings)], tmp_path / "x.png", metric=metric))
    assert (found[: len(header)], first[: len(line)]) == (header, line)


def test_a_figure_without_a_place_and_runs_about_different_things_are_refused(tmp_path, capsys):
    text, task = run_of(tmp_path / "a", LOSSES, {}), run_of(tmp_path / "b", SOLVED, TASK)
    with pytest.raises(UserError, match="nats_bound' is a single value without depth or noise level; read it in eval/"):
        plot_runs([text], tmp_path / "x.png", metric="nats_bound")
    assert main(["plot", str(text), str(task), "--out", str(tmp_path / "x.png")]) == 2
    assert "(a: nats_per_token, b: solved); choose one with --metric" in capsys.readouterr().err


def test_the_trained_depths_of_a_run_are_shaded_once(tmp_path, monkeypatch):
    from looped.evaluation import plots

    texts = []
    monkeypatch.setattr(plots, "save", lambda figure, axes, path: texts.extend(axes.get_legend_handles_labels()[1]))
    plot_runs([run_of(tmp_path / "a", SOLVED, TASK)], tmp_path / "x.png")
    assert sum(text.startswith("trained depth") for text in texts) == 1
    assert len(texts) == 3
