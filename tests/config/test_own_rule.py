"""A training rule of one's own, named by the dotted path of its class: trained, measured, compared, refused."""

import json

import pytest
import yaml

from looped.cli import main
from looped.config import load_config
from looped.errors import UserError
from looped.objectives import objective_class

MODULE = """
from looped.config.rules import LOOP, Rule
from looped.objectives import Full, Objective

class Twice(Full):
    rule = Rule("twice", kinds=("text",), loops=True, depth=lambda config: 2 * config.recurrence.mean,
                reads=(*LOOP, "recurrence.mean"))

    def depths(self, random):
        return 0, 2 * self.config.mean

    def expected_depths(self):
        return self.depths(None)

class Asking(Twice):
    rule = Rule("asking", kinds=("text",), loops=True, reads=(*LOOP, "recurrence.mean"))

    def forward(self, tokens, random):
        loss = super().forward(tokens, random)
        return loss if loss.value.item() < 100 else super().forward(tokens, random)

class Bare(Objective):
    pass
"""
TINY = {"model": {"width": 16, "num_heads": 2, "num_core_layers": 1}, "recurrence": {"mean": 2},
        "data": {"path": "text", "cache_dir": "tokens", "vocab_size": 270, "length": 8, "heldout": 0.2},
        "training": {"batch_size": 4, "budget": 2, "threads": 1, "num_evals": 1},
        "evaluation": {"num_sequences": 2, "num_samples": 1, "sample_length": 2, "prompt_length": 2, "depths": [1, 4]}}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for part in range(6):
        (tmp_path / "text" / f"{part}.txt").write_text(f"number {part} of many lines\n" * 40)
    (tmp_path / "rule_of_mine.py").write_text(MODULE)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_trains_is_measured_and_compared_by_its_path(desk, in_place, capsys):
    assert main(["train", "tiny.yaml", "--run", "run", "--objective", "rule_of_mine.Twice"]) == 0
    line = json.loads((desk / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["num_steps"] == 4  # twice the mean
    assert main(["eval", "run", "--depths", "4"]) == 0
    config = load_config(desk / "run" / "config.yaml")
    assert (config.main_depth, objective_class(config).__name__) == (4, "Twice")
    with in_place():
        assert main(["compare", "tiny.yaml", "--objectives", "ar,mine=rule_of_mine.Twice", "--budget", "tokens",
                     "--amount", "64", "--seeds", "1", "--depths", "1", "--out", "both"]) == 0
    assert "| mine" in (desk / "both" / "compare.md").read_text()


def test_its_costs_are_those_of_a_step_of_it(desk, in_place, capsys):
    """Twice as deep as `full`: twice the FLOPs of the loop, beside the same around it."""
    def flops(objective, mean):
        assert main(["info", "tiny.yaml", "--objective", objective, "--recurrence.mean", str(mean)]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "FLOPs, with backward" in line]
        return line

    assert flops("rule_of_mine.Twice", 2) == flops("full", 4) != flops("full", 2)
    with in_place():
        assert main(["bench", "step", "tiny.yaml", "--objectives", "full,mine=rule_of_mine.Twice", "--repeats", "1",
                     "--json"]) == 0
    arms = json.loads(capsys.readouterr().out)["arms"]
    assert arms["mine"]["layer_forwards"] > arms["full"]["layer_forwards"]


def test_a_rule_that_asks_for_values_is_not_counted_and_told_the_way_out(desk, capsys):
    assert main(["train", "tiny.yaml", "--run", "run", "--objective", "rule_of_mine.Asking"]) == 0
    capsys.readouterr()
    assert main(["info", "tiny.yaml", "--objective", "rule_of_mine.Asking"]) == 2
    said = capsys.readouterr().err
    assert "objective rule_of_mine.Asking reads the value of a tensor in a training step" in said
    assert "run to the limit after without_values()" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("objective", "why"), [
    ("rule_of_mine.Bare", "has no rule; give the dotted path of a subclass of looped.objectives.Objective"),
    ("rule_of_mine.Nothing", "objective rule_of_mine.Nothing cannot be imported"),
    ("no_such_module.Rule", "objective no_such_module.Rule cannot be imported: No module named 'no_such_module'")])
def test_what_is_no_rule_is_refused(desk, objective, why):
    with pytest.raises(UserError, match=why):
        load_config(None, {"objective": objective})


def test_it_is_for_the_kinds_that_it_says(desk):
    with pytest.raises(UserError, match="objective twice is for text, and this config trains on a task"):
        load_config(None, {"objective": "rule_of_mine.Twice", "task.name": "prefix-sums"})
