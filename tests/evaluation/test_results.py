"""`looped.read_results`: the figures of runs as tidy tables of pandas, every value with its ids."""

import json
import sys

import pytest

import looped
from looped import UserError, load_run
from looped.cli import main
from looped.config import load_config
from looped.training.train import train

pandas = pytest.importorskip("pandas")
pytestmark = pytest.mark.usefixtures("unchecked")

KEYS = ["run", "data", "step", "settings", "metric", "depth"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A denoiser of text, measured on its own text and on another, with two settings; and a loop on problems."""
    path = tmp_path_factory.mktemp("results")
    for part in range(6):
        (path / f"{part}.txt").write_text(f"{part} " + "def f(x):\n    return x + 1\n" * 40)
    (path / "other.txt").write_text("quite another text " * 60)
    common = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "denoise.cond_width": 8,
              "training.budget": 1, "training.batch_size": 2, "training.threads": 1, "training.num_evals": 0,
              "evaluation.depths": [1, 2]}
    train(load_config(None, common | {
        "data.path": str(path / "[0-9].txt"), "data.cache_dir": str(path / "tokens"), "data.length": 16,
        "data.vocab_size": 270, "data.heldout": 0.4, "evaluation.num_sequences": 5, "evaluation.prompt_length": 4,
        "evaluation.num_samples": 2, "evaluation.sample_length": 4}), path / "text")
    train(load_config(None, common | {"objective": "truncated", "task.name": "prefix-sums", "task.difficulty": [2, 4],
                                      "evaluation.num_problems": 4, "evaluation.difficulties": [3, 5]}), path / "sums")
    for flags in ([], ["--text", str(path / "other.txt")], ["--denoise.solver", "heun"]):
        assert main(["eval", str(path / "text"), *flags]) == 0
    assert main(["eval", str(path / "sums")]) == 0
    return path


def test_every_line_of_depth_jsonl_is_a_row_of_several_runs_and_of_other_data(runs):
    found = looped.read_results([runs / "text", str(runs / "sums")])
    files = [runs / "text", runs / "sums", next((runs / "text/other").iterdir())]
    assert len(found) == sum(len((file / "eval/depth.jsonl").read_text().splitlines()) for file in files)
    assert found["depth"].dtype == found["difficulty"].dtype == found["n"].dtype == found["clusters"].dtype == "Int64"
    assert set(found["run"]) == {str(runs / "text"), str(runs / "sums")}
    assert set(found["settings"]) == {"", "denoise.solver=heun"}
    assert {data.rpartition("/")[2][:9] for data in found["data"]} == {"", "other.txt"}
    line = json.loads((runs / "sums/eval/depth.jsonl").read_text().splitlines()[0])
    row = found[found["run"] == str(runs / "sums")].iloc[0]
    assert all(row[name] == value for name, value in line.items())
    assert found[found["metric"] == "nats_at_sigma"]["depth"].isna().all()


def test_a_table_by_depth_keeps_texts_and_settings_apart(runs):
    """The first example of docs/figures.md, of which `pivot_table` by run would give the mean of three evaluations."""
    found = looped.read_results(runs / "text")
    nats = found[found["metric"] == "nats_per_token"]
    by_depth = nats.pivot(index="depth", columns="evaluation", values="mean")
    run = str(runs / "text")
    assert {name.partition(" (")[0] for name in by_depth} == {
        run, f"{run}, {runs / 'other.txt'}", f"{run}, denoise.solver=heun"}
    own = nats[(nats["data"] == "") & (nats["settings"] == "")]
    assert by_depth[run].to_list() == own["mean"].to_list()
    assert by_depth[run].to_list() != nats.pivot_table(index="depth", columns="run", values="mean")[run].to_list()
    assert set(found["by"]) == set(found["twin"]) == {""}


def test_checkpoints_of_a_run_are_named_by_their_step(runs, tmp_path):
    lines = [json.loads(line) for line in (runs / "text/eval/depth.jsonl").read_text().splitlines()]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/depth.jsonl").write_text("".join(json.dumps(line | {"step": step}) + "\n" for step in (1, 2)
                                                       for line in lines if "settings" not in line))
    assert set(looped.read_results(tmp_path)["evaluation"]) == {f"{tmp_path}, step 1", f"{tmp_path}, step 2"}


def test_one_run_is_read_by_its_name_alone(runs):
    found = looped.read_results(str(runs / "sums"))
    assert found.equals(looped.read_results([runs / "sums"]))
    assert list(found.pivot(index="difficulty", columns=["metric", "depth"], values="mean").index) == [3, 5]


def test_the_means_of_the_examples_are_the_figures_and_the_join_loses_none(runs):
    """By group, of every metric that has examples; a metric without depth is joined too."""
    both = [runs / "text", runs / "sums"]
    keys = [*KEYS, "difficulty"]
    means = looped.read_results(both, "examples").groupby(keys, dropna=False)["value"].agg(["mean", "size"])
    joined = means.reset_index().merge(looped.read_results(both), on=keys, suffixes=("_here", ""))
    assert len(joined) == len(means) > 10
    assert joined["mean_here"].to_list() == pytest.approx(joined["mean"].to_list())
    assert (joined["size"] == joined["n"]).all()
    assert joined[joined["metric"] == "nats_at_sigma_max"]["depth"].isna().all()


def test_each_example_has_its_document_or_problem_and_its_value(runs):
    found = looped.read_results(runs / "text", "examples")
    own = found[(found["data"] == "") & (found["settings"] == "") & (found["metric"] == "nats_per_token")]
    told = json.loads((runs / "text/eval/sequences.jsonl").read_text().splitlines()[0])
    values = [json.loads(line) for line in (runs / "text/eval/examples.jsonl").read_text().splitlines()]
    (second,) = [line["values"] for line in values if (line["metric"], line["depth"]) == ("nats_per_token", 2)
                 and "settings" not in line]
    at = own[own["depth"] == 2]
    assert at["value"].to_list() == second
    for name in ("document", "offset", "start"):
        assert at[name].to_list() == told[name]
    assert {name.rpartition("/")[2] for name in found[found["data"] != ""]["document"]} == {"other.txt"}
    sums = looped.read_results(runs / "sums", "examples")
    assert sums[(sums["depth"] == 1) & (sums["difficulty"] == 5)]["index"].to_list() == [0, 1, 2, 3]
    assert set(sums["seed"]) == {0}


def test_samples_are_joined_with_the_losses_of_the_sequence_that_they_begin(runs):
    samples = looped.read_results(runs / "text", "samples")
    examples = looped.read_results(runs / "text", "examples")
    losses = examples[examples["metric"] == "nats_per_token"]
    joined = samples.merge(losses, on=["run", "data", "step", "settings", "depth", "sequence", "start"])
    assert len(joined) == len(samples) == 3 * 2 * 2
    run = load_run(runs / "text")
    for line in joined[joined["data"] == ""].itertuples():
        assert run.tokenizer.decode(run.data.heldout.tokens[line.start : line.start + 4].tolist()) == line.prompt


def test_files_of_before_there_were_ids_are_read(runs, tmp_path):
    (tmp_path / "eval").mkdir()
    for name in ("depth", "examples", "samples"):
        lines = [json.loads(line) for line in (runs / f"text/eval/{name}.jsonl").read_text().splitlines()]
        (tmp_path / f"eval/{name}.jsonl").write_text("".join(
            json.dumps({key: value for key, value in line.items() if key != "sequence"}) + "\n" for line in lines))
    new, old = (looped.read_results(run, "examples") for run in (runs / "text", tmp_path))
    assert "document" not in old
    assert old["value"].to_list() == new[new["data"] == ""]["value"].to_list()
    assert looped.read_results(tmp_path, "samples")["sequence"].isna().all()
    assert len(looped.read_results(tmp_path)) > 10


def test_figures_of_benchmark_tasks_are_a_table(tmp_path):
    (tmp_path / "eval").mkdir()
    line = {"step": 3, "metric": "acc", "mean": 0.5, "n": 8, "depth": 2, "task": "ends", "num_fewshot": 0}
    (tmp_path / "eval/tasks.jsonl").write_text(json.dumps(line) + "\n")
    (row,) = looped.read_results(tmp_path, "tasks").to_dict("records")
    assert {name: row[name] for name in line} == line
    assert row["run"] == str(tmp_path)


@pytest.mark.parametrize(("table", "content", "why"), [
    ("figures", None, r"has no eval/depth.jsonl; measure it with looped eval .*run$"),
    ("tasks", None, r"has no eval/tasks.jsonl; measure it with looped eval .*run --tasks NAME"),
    ("figures", '{"metric": "sol', r"depth.jsonl is damaged; rebuild it"),
    ("figure", None, "did you mean 'figures'"),
])
def test_what_cannot_be_read_is_one_sentence(table, content, why, tmp_path):
    if content is not None:
        (tmp_path / "run/eval").mkdir(parents=True)
        (tmp_path / "run/eval/depth.jsonl").write_text(content)
    with pytest.raises(UserError, match=why):
        looped.read_results(tmp_path / "run", table)


def test_the_folder_of_a_comparison_is_told(tmp_path):
    (tmp_path / "compare.jsonl").write_text("")
    with pytest.raises(UserError, match=r"folder of a comparison.*compare.jsonl; read them with pandas.read_json"):
        looped.read_results(tmp_path)


def test_without_pandas_a_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        looped.read_results(tmp_path)
