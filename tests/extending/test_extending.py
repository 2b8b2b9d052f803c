"""Extensions, each one file of this folder named by a dotted path: a rule, a kind of data, a solver, an exit, a core.
Each trains, is evaluated over depth, writes where that means something, is compared and benched by the command line,
and comes back in another process, with no edit in looped/ (docs/extending.md walks through them)."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from pages import ROOT, files

from looped.cli import main
from looped.config import load_config
from looped.errors import UserError
from looped.training.runs import load_run

pytestmark = pytest.mark.usefixtures("unchecked")  # code from outside annotates as it likes

HERE = Path(__file__).parent
TINY = {"model": {"width": 16, "num_heads": 2, "num_core_layers": 1}, "recurrence": {"mean": 2},
        "denoise": {"cond_width": 8, "context": "inject", "target": {"dim": 8}}, "optim": {"lr": 1e-2},
        "training": {"batch_size": 8, "budget": 4, "threads": 1, "num_evals": 1, "sample_every": 4},
        "evaluation": {"num_sequences": 2, "num_samples": 2, "sample_length": 3, "prompt_length": 2, "depths": [1, 2],
                       "sample_depths": [1], "num_problems": 8}}
TEXT = TINY | {"data": {"path": "text", "cache_dir": "tokens", "vocab_size": 270, "length": 8, "heldout": 0.2}}
SOUNDS = TINY | {"domain": {"name": "tones.Tones", "options": {"frame": 8, "noise": 0.1}}, "objective": "full"}
NUMBERS = TINY | {"domain": {"name": "counting.Counting"}, "data": {"length": 8}}
SUMS = TINY | {"task": {"name": "prefix-sums", "difficulty": [3, 4]}, "objective": "denoise"}
RULE, SOLVER, CORE = "flow_rule.FlowMatching", "midpoint_solver.sample_midpoint", "gated_core.GatedCore"
RUNS = {"rule": ["text.yaml", "--objective", RULE], "data": ["sounds.yaml"],
        "solver": ["sums.yaml", "--denoise.solver", SOLVER],
        "core": ["text.yaml", "--objective", "truncated", "--model.core", CORE]}
ELSEWHERE = """
import json, sys
from looped import load_run
told = []
for path in sys.argv[1:]:
    run = load_run(path)
    told.append([type(run.objective).__name__, type(run.objective.model).__name__,
                 sum(p.sum().item() for p in run.objective.parameters()), run.config.main_depth,
                 type(run.data).__name__])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the extensions, as somebody has them beside their runs."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "text").mkdir()
    for part in range(6):
        (folder / "text" / f"{part}.txt").write_text(f"number {part} of many lines\n" * 40)
    for file in HERE.glob("*.py"):
        if not file.name.startswith("test_"):
            shutil.copy(file, folder)
    for name, content in files(ROOT / "docs" / "extending.md").items():
        (folder / name).write_text(content)
    for file in folder.glob("*.py"):
        sys.modules.pop(file.stem, None)
    for name, config in {"text": TEXT, "sounds": SOUNDS, "sums": SUMS, "numbers": NUMBERS}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def desk(folder, monkeypatch):
    """The folder, in which a test is at work."""
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def said(folder):
    """Of each of RUNS, trained under its name in the folder: what its training says."""
    told = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in RUNS.items():
            with redirect_stdout(io.StringIO()) as told[name]:
                looped("train", *words, "--run", name)
    return {name: text.getvalue() for name, text in told.items()}


def looped(*words):
    assert main([str(word) for word in words]) == 0


def rows(run):
    return [json.loads(line) for line in (Path(run) / "eval/depth.jsonl").read_text().splitlines()]


def compared(out):
    return [json.loads(line) for line in (Path(out) / "compare.jsonl").read_text().splitlines()]


def compare_and_bench(config, arms, out, capsys, *settings):
    """Rows of a comparison, and the figures of a bench, of some arms."""
    looped("compare", config, "--objectives", ",".join(arms), "--budget", "tokens", "--amount", 150, "--seeds", 1,
           "--depths", "1,2", "--out", out, *settings)
    capsys.readouterr()
    looped("bench", "step", config, "--objectives", ",".join(arms), "--repeats", 1, "--json", *settings)
    return compared(out), json.loads(capsys.readouterr().out)["arms"]


def test_another_process_finds_in_a_run_what_this_one_does(desk, said):
    told = subprocess.run([sys.executable, "-c", ELSEWHERE, *said], capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert told.returncode == 0, told.stderr
    for name, (objective, model, total, depth, data) in zip(said, json.loads(told.stdout), strict=True):
        here = load_run(name)
        assert (objective, model) == (type(here.objective).__name__, type(here.objective.model).__name__)
        assert total == pytest.approx(sum(p.sum().item() for p in here.objective.parameters()), abs=1e-9)
        assert (depth, data) == (here.config.main_depth, type(here.data).__name__)


def test_processes_that_a_command_starts_find_what_lies_in_its_folder(desk, capsys):
    """A training of a comparison and an arm of a bench, in processes of their own."""
    found, arms = compare_and_bench("text.yaml", [f"mine={RULE}"], "processes", capsys)
    assert {row["arm"] for row in found if row["kind"] == "cost"} == {"mine"}
    assert arms["mine"]["peak_rss_bytes"] > arms["mine"]["base_rss_bytes"] > 1e6


def test_a_training_rule(desk, said, in_place, capsys):
    looped("eval", "rule", "--depths", "1,4")
    by_depth = {row["depth"]: row for row in rows("rule") if row["metric"] == "nats_per_token"}
    assert by_depth[4]["layer_forwards"] == 1 + 4 * 2
    assert by_depth[1]["mean"] != by_depth[4]["mean"]
    capsys.readouterr()
    looped("generate", "rule", "--prompt", "number", "--num_tokens", 4, "--depth", 3)
    assert capsys.readouterr().out.startswith("number")
    with in_place():
        found, arms = compare_and_bench("text.yaml", ["ar", f"mine={RULE}"], "rules", capsys)
    assert {row["arm"] for row in found if row["kind"] == "cost"} == {"ar", "mine"}
    assert arms["mine"]["layer_forwards"] == arms["ar"]["layer_forwards"]


def test_a_flow_learns(desk):
    """Positive control: of two texts it learns the next letter, at the first Euler step and after four."""
    looped("train", "text.yaml", "--run", "flow", "--objective", RULE, "--training.budget", 120,
           "--training.sample_every", 0)
    looped("eval", "flow", "--depths", "1,4")
    means = [row["mean"] for row in rows("flow") if row["metric"] == "nats_per_token"]
    assert max(means) < 2.5  # chance is ln 270 = 5.6


def test_a_kind_of_data(desk, said, in_place, capsys):
    assert " taken for " in said["data"]  # the sample while training
    looped("eval", "data", "--depths", "1,4")
    assert [(row["metric"], row["depth"], row["n"]) for row in rows("data")] == [
        ("accuracy", 1, 64), ("accuracy", 4, 64)]
    assert main(["generate", "data"]) == 2
    assert "names sounds and writes no text" in capsys.readouterr().err
    with in_place():
        found, arms = compare_and_bench("sounds.yaml", ["full", "denoise"], "sounds", capsys)
    assert {row["depth"] for row in found if row["kind"] == "share"} == {1, 2}
    assert "held-out sounds" in (desk / "sounds" / "compare.md").read_text()
    assert arms["full"]["step_flops"] > arms["denoise"]["step_flops"] > 0
    looped("info", "sounds.yaml")


def test_a_kind_of_text_without_a_tokenizer(desk, in_place, capsys):
    """Token ids are its text."""
    words = ["numbers.yaml", "--objective", "full", "--training.sample_every", 2]
    looped("train", *words, "--run", "numbers")
    assert re.search(r"'( \d)+'", capsys.readouterr().out)  # the sample while training
    looped("eval", "numbers", "--depths", "1,2", "--probes")
    samples = [json.loads(line) for line in (desk / "numbers/eval/samples.jsonl").read_text().splitlines()]
    assert all(set(sample["text"]) <= set(" 0123456789") and sample["text"] for sample in samples)
    capsys.readouterr()
    looped("generate", "numbers", "--prompt", "7 8 9", "--num_tokens", 3, "--depth", 2)
    assert re.fullmatch(r"7 8 9( \d){3}\n", capsys.readouterr().out)
    with in_place():
        compare_and_bench("numbers.yaml", ["full"], "numbering", capsys)
    for wrong, why in ((["generate", "numbers", "--prompt", "seven"], "'seven' is no list of token ids"),
                       (["eval", "numbers", "--text", "text"], "text cannot be encoded for data without a tokenizer")):
        assert main(wrong) == 2
        assert why in capsys.readouterr().err


def test_a_kind_of_data_that_finds_nothing_is_a_sentence(desk, capsys):
    (desk / "nowhere.py").write_text("from counting import Counting\n\n\nclass Nowhere(Counting):\n"
                                     "    def find(self, config):\n        pass\n")
    assert main(["train", "numbers.yaml", "--run", "run", "--domain.name", "nowhere.Nowhere"]) == 2
    assert "find of domain.name nowhere.Nowhere returned None; return a looped.data.from" in capsys.readouterr().err


def test_a_kind_of_data_is_learned(desk):
    """Positive control: waves are told apart, which are four."""
    looped("train", "sounds.yaml", "--run", "waves", "--training.budget", 100, "--training.batch_size", 16)
    looped("eval", "waves", "--depths", "2")
    assert rows("waves")[-1]["mean"] > 0.6


def test_a_solver(desk, said):
    """The cost of its solves is that of its evaluations, which it never states."""
    looped("eval", "solver", "--depths", "1,4")
    evaluations = {row["depth"]: row["evaluations"] for row in rows("solver") if row["metric"] == "solved"}
    assert evaluations == {1: 1, 4: 7}
    looped("eval", "solver", "--depths", "4", "--denoise.solver", "euler")
    assert rows("solver")[-1]["evaluations"] == 4


@pytest.mark.slow
def test_a_solver_is_compared_and_benched(desk, in_place, capsys):
    with in_place():
        found, arms = compare_and_bench("sums.yaml", ["denoise", f"mine=denoise denoise.solver={SOLVER}"], "solvers",
                                        capsys)
    assert {row["arm"] for row in found if row["kind"] == "share"} == {"denoise", "mine"}
    assert arms["mine"]["step_flops"] == arms["denoise"]["step_flops"]  # a solver is no part of training


def test_a_solver_writes_text(desk, capsys):
    looped("train", "text.yaml", "--run", "writer", "--objective", "denoise")
    looped("generate", "writer", "--prompt", "number", "--num_tokens", 3, "--depth", 3, "--denoise.solver", SOLVER)
    assert "number" in capsys.readouterr().out


def test_an_exit(desk):
    looped("train", "sums.yaml", "--run", "exit", "--objective", "full")
    looped("eval", "exit", "--depths", "4", "--exits", "margin_exit.Margin=0.0,margin_exit.Margin=1.0,confidence")
    used = {row["by"]: row["mean"] for row in rows("exit") if row["metric"] == "steps_used" and row["difficulty"] == 16}
    assert used["margin_exit.Margin=0"] < used["margin_exit.Margin=1"] == 4
    assert "margin_exit.Margin" in (desk / "exit" / "report.html").read_text()


def test_a_core(desk, said):
    looped("eval", "core", "--depths", "1,4")
    assert len({row["mean"] for row in rows("core") if row["metric"] == "nats_per_token"}) == 2
    looped("generate", "core", "--prompt", "number", "--num_tokens", 4, "--depth", 3)


@pytest.mark.slow
def test_a_core_is_compared_and_benched(desk, in_place, capsys):
    with in_place():
        found, arms = compare_and_bench("text.yaml", ["full", f"mine=denoise model.core={CORE}"], "cores", capsys)
    assert {row["arm"] for row in found if row["kind"] == "cost"} == {"full", "mine"}
    assert arms["mine"]["step_flops"] != arms["full"]["step_flops"]


def test_a_core_keeps_its_own_initialisation_and_is_counted_as_it_runs(desk):
    from looped.cost.counts import count
    from looped.models.build import build

    config = load_config("text.yaml", {"model.core": "gated_core.GatedCore", "objective": "full"})
    model = build(config, 270)
    cell = model.recurrence.core.blocks[0].block.cells[0]
    assert cell.weight_ih.abs().max() <= 16**-0.5  # torch's own: uniform within 1 / sqrt(width)
    assert torch.equal(cell.weight_ih, build(config, 270).recurrence.core.blocks[0].block.cells[0].weight_ih)
    deeper = count(config.replace(**{"recurrence.mean": 3}), 270).step_flops - count(config, 270).step_flops
    assert deeper == 3 * 8 * 8 * 2 * (2 * 3 * 16 * 16)  # forward and twice backward, 64 rows, two maps to three gates


@pytest.mark.parametrize("rule", ["full", "denoise"])
def test_a_core_that_reads_ahead_is_not_trained(desk, rule, capsys):
    assert main(["train", "text.yaml", "--run", f"ahead-{rule}", "--objective", rule, "--model.core",
                 "gated_core.Ahead"]) == 2
    said = capsys.readouterr().err
    assert "Ahead lets row 2 change row 1, from which the attention mask (Causal) hides it" in said
    looped("train", "text.yaml", "--run", "ahead-masked", "--objective", "masked", "--model.core", "gated_core.Ahead")


@pytest.mark.parametrize(("flags", "why"), [
    ({"model.core": "gated_core.Leaky"}, "Leaky lets later rows change earlier ones without taking the attention mask"),
    ({"model.core": "gated_core.Nothing"}, "model.core gated_core.Nothing cannot be imported"),
    ({"model.core": "gated_core.GatedCore", "objective": "denoise", "denoise.context": "concat"},
     "denoise.context concat lets noisy rows attend to clean ones in every layer, and model.core"),
    ({"domain.name": "gated_core.GatedCore"}, "domain.name gated_core.GatedCore has no kind"),
    ({"domain.name": "tones.Tones", "task.name": "sudoku"}, "sudoku and domain.name tones.Tones are both set"),
    ({"denoise.solver": "hoin"}, "'hoin' is unknown; known names: .*; or give the dotted path of a custom one"),
    ({"domain.name": "tones.Tones", "objective": "masked"}, "domain.name tones.Tones is not text")])
def test_what_is_none_is_refused_in_a_sentence(desk, flags, why):
    from looped.models.build import build

    with pytest.raises(UserError, match=why):
        build(load_config("text.yaml", flags), 270)


def test_a_domain_without_data_is_a_sentence(desk, capsys):
    (desk / "bare.py").write_text("from tones import Tones\nfrom looped.domains import Domain\n\n"
                                  "class Bare(Tones):\n    find = Domain.find\n")
    assert main(["train", "sounds.yaml", "--run", "run", "--domain.name", "bare.Bare"]) == 2
    said = capsys.readouterr().err
    assert "domain.name bare.Bare does not define how its data are found" in said
    assert said.count("\n") == 1


def test_options_that_do_not_fit_are_a_sentence(desk, capsys):
    assert main(["train", "sounds.yaml", "--run", "run", "--domain.options", "{fram: 8}"]) == 2
    said = capsys.readouterr().err
    assert "domain.options {'fram': 8} do not fit domain.name tones.Tones: " in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("exits", "why"), [
    ("margin_exit.Margin=x", "has no threshold of 0 or more"), ("gated_core.GatedCore", "is no exit"),
    ("midpoint_solver.sample_midpoint=2", "is a function, which has no threshold"),
    ("margn", "exit 'margn' is unknown")])
def test_what_is_no_exit_is_refused_in_a_sentence(exits, why, desk):
    from looped.inference.exits import Exit

    with pytest.raises(UserError, match=why):
        Exit.parse(exits)
