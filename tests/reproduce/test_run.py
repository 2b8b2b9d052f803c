"""Two tiny suites as they are run, the same command again, and what fails."""

import json
from types import SimpleNamespace

import pytest

from looped.cli import main
from looped.errors import UserError
from looped.reproduce import run
from looped.reproduce.plan import plan_entries

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

WRITERS = {
    "title": "Writers", "reproduces": "nothing, table 1", "config": "stdlib-denoise.yaml", "budget": "tokens",
    "depths": [1, 2], "by_depth": True,
    "settings": {
        "data.vocab_size": 300, "data.length": 16, "data.heldout": 0.2, "model.width": 16, "model.num_heads": 2,
        "model.num_core_layers": 1, "denoise.cond_width": 8, "recurrence.mean": 2, "recurrence.backprop": 1,
        "training.batch_size": 4, "training.num_evals": 1, "evaluation.num_sequences": 4, "evaluation.num_samples": 3,
        "evaluation.sample_length": 4, "evaluation.prompt_length": 4, "evaluation.sample_depths": [1]},
    "arms": {"once": {"text": "ar", "depths": [1], "published": {"perplexity, text9": "17.5"}},
             "denoised": {"text": "denoise", "budget": 2}},
    "scales": {"cpu": {
        "time": "seconds", "amount": 128,  # two steps
        "beforehand": {"ar-1000": {"settings": {"objective": "ar", "seed": 1000}, "budget": 2}},
        "evaluate": [{"judge": "ar-1000", "settings": {"evaluation.num_samples": 5}}]}},
    "columns": [{"label": "perplexity, {judge}", "where": {"kind": "evaluation", "metric": "judged_nats"},
                 "show": "exp"},
                {"label": "bound", "where": {"kind": "figure", "metric": "nats_per_token"}}]}

TASKS = {
    "title": "Tasks", "reproduces": "nothing, table 2", "config": "sudoku4-denoise.yaml", "budget": "layer-forwards",
    "depths": [1, 2],
    "settings": {
        "objective": "full", "task.options": {}, "task.difficulty": None, "model.width": 16, "model.num_heads": 2,
        "model.num_core_layers": 1, "recurrence.mean": 2, "denoise.cond_width": 8, "training.batch_size": 4,
        "training.num_evals": 1, "evaluation.num_problems": 4, "evaluation.depths": [1, 2]},
    "arms": {"denoise": {"text": "denoise"}, "loop": {"text": "full optim.lr=0.01"}},
    "entries": {"sums": {"settings": {"task.name": "prefix-sums"}, "own": {"loop": {"optim.lr": 0.002}}},
                "parity": {"settings": {"task.name": "parity", "task.layout": "causal"}, "amount": 50}},
    "scales": {"cpu": {"time": "seconds", "evaluate": [
        {"evaluation": "twice", "arms": ["loop"], "settings": {"evaluation.trajectories": 2}}]}}, "amount": 60,
    "columns": [{"label": "solved", "where": {"kind": "equal", "budget": "layer_forwards"}, "show": "equal"}],
    "details": [{"label": "{difficulty}", "where": {"kind": "share", "at": "deepest"}, "show": "with depth"}]}


@pytest.fixture
def text(tmp_path):
    """Settings of a text of its own."""
    (tmp_path / "text").mkdir()
    for part in range(6):
        lines = [f"def f{i}(x):\n    return x * {i} + {i * i % 17}  # {part}\n\n" for i in range(100)]
        (tmp_path / "text" / f"{part}.txt").write_text("".join(lines))
    return {"data.path": str(tmp_path / "text"), "data.cache_dir": str(tmp_path / "tokens")}


@pytest.fixture
def trained_in_place(in_place):
    with in_place():
        yield


def lines_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


@pytest.mark.usefixtures("trained_in_place")
def test_writers_are_trained_and_judged_by_a_run_of_another_seed_and_the_same_command_goes_on(
        text, write, tmp_path, capsys):
    path = write(WRITERS | {"settings": WRITERS["settings"] | text})
    command = ["reproduce", str(path), "--seeds", "1", "--jobs", "2", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    table = (tmp_path / "out/tiny.md").read_text()
    assert table.strip() in capsys.readouterr().out
    header, _, *lines = lines_of(table)
    assert header == ["arm", "depth", "perplexity, ar-1000", "bound", "the paper: perplexity, text9"]
    assert [line[:2] for line in lines] == [["once", "1"], ["denoised", "1"], ["denoised", "2"]]
    assert [line[4] for line in lines] == ["17.5", "-", "-"]
    assert all(float(cell) > 1 for line in lines for cell in line[2:4])
    rows = list(map(json.loads, (tmp_path / "out/tiny.jsonl").read_text().splitlines()))
    spent = {row["arm"]: row["tokens"] for row in rows if row["kind"] == "cost"}
    assert spent == {"once": 128, "denoised": 256}
    judged = [row for row in rows if row["kind"] == "evaluation" and row["metric"] == "judged_nats"]
    assert {row["n"] for row in judged} == {5}, "as many samples as the evaluation asks for"
    assert (tmp_path / "out/ar-1000/config.yaml").read_text().count("seed: 1000") == 1

    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 of 2 runs are trained already" in said
    assert "evaluating" not in said
    assert (tmp_path / "out/tiny.md").read_text() == table


@pytest.mark.usefixtures("trained_in_place")
def test_every_entry_has_a_comparison_and_an_arm_that_one_refuses_a_footnote(write, tmp_path, capsys):
    command = ["reproduce", str(write(TASKS)), "--seeds", "1", "--jobs", "2", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    table = (tmp_path / "out/tiny.md").read_text()
    main_table = {line[0]: line[1:] for line in lines_of(table.split("##")[0])}
    assert main_table["arm"] == ["sums: solved", "parity: solved"]
    assert main_table["denoise"][1] == "[1]"
    assert all(0 <= float(cell) <= 1 for cell in (main_table["denoise"][0], main_table["loop"][1]))
    assert "[1] does not apply: denoise.order confidence fixes the cells" in table
    assert "## sums" in table
    assert "optim.lr=0.002" in (tmp_path / "out/sums/compare.md").read_text()
    assert "optim.lr=0.01" in (tmp_path / "out/parity/compare.md").read_text()
    assert not (tmp_path / "out/parity/denoise.yaml").exists()
    rows = [json.loads(line) for line in (tmp_path / "out/tiny.jsonl").read_text().splitlines()]
    assert {(row["arm"], row["evaluation"], row["trajectories"]) for row in rows
            if row["kind"] == "evaluation" and row["metric"] == "solved"} == {("loop", "twice", 2)}
    capsys.readouterr()

    assert main([*command, "--amount", "70"]) == 2  # another comparison than the folder's
    said = capsys.readouterr().err
    assert "was started with training.budget 60" in said
    assert said.count("\n") == 1
    assert (tmp_path / "out/tiny.md").read_text() == table


@pytest.fixture
def carried_out(order, small, write, monkeypatch):
    """`carried_out(compared)`: the suite of two arms and seeds, with `compared` in the place of all that trains."""
    def go(compared, **suite):
        asked = order(write(small(**suite)), seeds=2)
        monkeypatch.setattr(run, "compared", lambda plan, **_: compared(plan))
        return lambda: run.reproduce(asked)

    return go


def test_what_has_failed_is_told_in_its_own_words_and_the_next_entry_is_done(carried_out, tmp_path):
    def compared(plan):
        if plan.out.name == "broken":
            raise UserError("no such images")
        plan.out.mkdir(parents=True)
        rows = [{"kind": "figure", "arm": "loop", "seed": 0, "metric": "accuracy", "depth": 1, "mean": 0.5}]
        (plan.out / "compare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SimpleNamespace(signal=0, finished=[plan.places[0]], failures={
            "loop, seed 1": "the loss is not finite", "once, seed 0": "killed", "once, seed 1": "killed"})

    with pytest.raises(UserError, match="broken: loop: no such images; finished runs are kept in"):
        carried_out(compared, entries={"broken": {}, "digits": {}})()
    table = (tmp_path / "out/tiny.md").read_text()
    assert [line[:3] for line in lines_of(table)[2:]] == [["loop", "[1]", "0.500 [2]"], ["once", "[1]", "[3]"]]
    assert "[2] 1 of 2 seeds have finished: the loss is not finite" in table
    assert "[3] 0 of 2 seeds have finished: killed" in table


def test_what_is_stopped_goes_no_further(carried_out, tmp_path):
    asked = []
    stop = SimpleNamespace(signal=2, finished=[], failures={})
    assert carried_out(lambda plan: (asked.append(plan.out.name), stop)[1], entries={"a": {}, "b": {}})() == 130
    assert asked == ["a"]
    assert not (tmp_path / "out").exists()


def test_settings_of_the_user_are_above_those_of_the_suite_and_what_one_entry_needs_is_not_for_others(
        order, small, write):
    entries = {"plain": {"settings": {"model.width": 64}, "amount": 7},
               "own": {"needs": {"images.path": "a folder"}, "settings": {"images.source": "folder"}}}
    asked = order(write(small(entries=entries)), amount=9, settings={"images.path": "here", "model.width": "32"})
    plain, own = (entry.plan.config for entry in plan_entries(asked))
    assert (plain.images.path, own.images.path) == (None, "here")
    assert (plain.model.width, own.model.width, plain.training.budget) == (32, 32, 9)


# ---- shipped suites, on tiny models ----------------------------------------------------------------------------------

LITTLE = {"model.width": "16", "model.num_heads": "2"}
PIXELS = LITTLE | {"model.ffn_width": "16", "model.patch_size": "4", "denoise.cond_width": "8"}
WORDS = LITTLE | {"data.vocab_size": "300", "data.length": "16", "data.heldout": "0.2", "training.batch_size": "4",
                  "evaluation.num_sequences": "4", "evaluation.num_samples": "20", "evaluation.sample_length": "8",
                  "evaluation.prompt_length": "4"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "asked", "settings"), [
    ("masked_table3", {"amount": 60}, WORDS | {"model.num_core_layers": "3", "evaluation.levels": "2"}),
    ("huginn_table5", {"amount": 64}, WORDS | {"recurrence.mean": "2", "recurrence.backprop": "1"}),
    ("blocks_table4", {"amount": 200}, WORDS),
    ("classifier_tables", {"amount": 3000, "entries": "digits"}, PIXELS | {"model.num_core_layers": "3"}),
    ("dit_table2", {"amount": 2000, "arms": "twin,2-blocks"}, PIXELS | {
        "training.batch_size": "8", "evaluation.depths": "[1,2]", "evaluation.num_images": "20"}),
    ("depth_tasks", {"amount": 2, "entries": "sudoku4"}, {
        "model.width": "24", "model.num_core_layers": "1", "supervision.segments": "2", "fixed_point.max_steps": "4",
        "denoise.cond_width": "8", "training.batch_size": "8", "evaluation.num_problems": "8",
        "evaluation.depths": "[1,3]"})])
def test_a_shipped_suite_fills_its_table(order, text, tmp_path, name, asked, settings):
    pytest.importorskip("sklearn")
    words = text if "data.length" in settings else {}
    asked = order(name, seeds=1, jobs=2, settings=settings | words, **asked)
    assert run.reproduce(asked) == 0
    table = (tmp_path / f"out/{name}.md").read_text()
    lines = {line[0]: line[1:] for line in lines_of(table)}
    assert set(asked.arms) < set(lines)
    assert "[1]" not in table
    assert "nan" not in table
    assert all(cells[0] != "-" for cells in lines.values())
