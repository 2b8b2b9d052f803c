"""A run on a mixture: resumed bit for bit, the same on two processes, and refused by name when a source has changed."""

import shutil

import pytest
import torch
from same_runs import assert_same

from looped.cli import main
from looped.config import load_config
from looped.data.from_config import open_data
from looped.errors import UserError
from looped.training.callbacks import Callback
from looped.training.heldout import heldout_figures
from looped.training.logs import read_metrics
from looped.training.runs import load_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def config(tiny, text_folder, tmp_path):
    """Two sources of the same files' halves, 0.7 and 0.3 of the sequences."""
    for name, files in (("head", range(5)), ("tail", range(5, 8))):
        (tmp_path / name).mkdir()
        for file in files:
            shutil.copy(text_folder / f"{file}.txt", tmp_path / name)
    sources = {"head": {"path": str(tmp_path / "head"), "weight": 7}, "tail": {"path": str(tmp_path / "tail"),
                                                                              "weight": 3}}
    return lambda **changes: tiny(**{"objective": "truncated", "data.path": [], "data.mixture": sources,
                                     "data.cache_dir": str(tmp_path / "tokens"), "evaluation.num_sequences": 10,
                                     "training.eval_every": 4} | changes)


class Stop(Callback):
    def __init__(self, step):
        self.last = step

    def on_step(self, trainer):
        if trainer.done.step == self.last:
            trainer.stop()


@pytest.mark.parametrize("changes", [{}, {"training.accumulation": 2}])
def test_a_stopped_run_goes_on_bit_for_bit(config, tmp_path, changes):
    train(config(**changes), tmp_path / "whole", quiet=True)
    train(config(**changes), tmp_path / "again", callbacks=[Stop(5)], quiet=True)
    train(config(**changes), tmp_path / "again", quiet=True)
    assert_same(tmp_path / "again", tmp_path / "whole")


def test_held_out_figures_are_those_of_each_source_and_their_mean_by_weight(config, tmp_path):
    train(config(), tmp_path / "run", quiet=True)
    run = load_run(tmp_path / "run")
    logged = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "heldout"][-1]
    for name, num in (("head", 7), ("tail", 3)):
        alone = config(**{"data.mixture": {}, "data.path": [str(tmp_path / name)], "evaluation.num_sequences": num})
        part = heldout_figures(run.objective, run.data.parts[name], alone)
        for metric in ("loss", "next_token"):
            assert logged[f"{metric}/{name}"] == pytest.approx(part[metric], rel=1e-6)
    for metric in ("loss", "next_token"):
        mean = 0.7 * logged[f"{metric}/head"] + 0.3 * logged[f"{metric}/tail"]
        assert logged[metric] == pytest.approx(mean, rel=1e-6)
        assert logged[f"{metric}/head"] != logged[f"{metric}/tail"]


def test_an_evaluation_and_info_name_the_sources(config, tmp_path, capsys):
    train(config(), tmp_path / "run", quiet=True)
    assert main(["eval", str(tmp_path / "run"), "--depths", "1,3"]) == 0
    said = capsys.readouterr().out
    for name, num in (("head", 7), ("tail", 3)):
        for depth in (1, 3):
            assert f"| {name:6} | {depth:5} | {num:9} |" in said
    assert main(["info", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "mixture, in parts of the training sequences: 0.7 head: 22 sequences, " in said
    assert said.count(" epochs") == 2


def test_a_changed_source_is_refused_by_name_and_a_changed_weight_as_a_setting(config, tmp_path):
    train(config(), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r"was started with data.mixture.tail.weight 3.0, now it is 4.0"):
        train(config(**{"data.mixture.tail.weight": 4}), tmp_path / "run", quiet=True)
    (tmp_path / "tail" / "more.txt").write_text("def more(): pass\n" * 99)
    with pytest.raises(UserError, match=r"documents of tail 3 then, 4 now, .* of tail"):
        _ = load_run(tmp_path / "run").data
    (tmp_path / "tail" / "more.txt").unlink()
    other = (tmp_path / "head" / "0.txt").read_text().replace("number", "digits")
    (tmp_path / "head" / "0.txt").write_text(other)
    with pytest.raises(UserError, match=r"; fingerprint of head \w+ then, \w+ now, ") as error:
        train(config(), tmp_path / "run", quiet=True)
    assert "of tail" not in str(error.value)


def test_a_mixture_of_one_source_trains_the_weights_of_that_source(config, tmp_path):
    given = {"data.tokenizer": str(tmp_path / "t.json"), "data.mixture": {}}
    (tmp_path / "t.json").write_text(open_data(config()).tokenizer.json(), encoding="utf-8")
    plain = train(config(**given | {"data.path": [str(tmp_path / "head")]}), tmp_path / "plain", quiet=True)
    one = {"data.mixture": {"only": {"path": str(tmp_path / "head")}}}
    mixed = train(config(**given | one), tmp_path / "mixed", quiet=True)
    for ours, theirs in zip(mixed.objective.parameters(), plain.objective.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_settings_of_sources_are_flags(config, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("data: {mixture: {a: {weight: 1}, b: {weight: 1}}}", encoding="utf-8")
    with pytest.warns(UserWarning, match="data.split has no effect under data.mixture"):
        assert main(["info", str(tmp_path / "c.yaml"), "--data.mixture.a.weight", "3", "--data.split", "x",
                     "--data.mixture.b.path", "nowhere"]) == 0
    assert "0.75 a: 24,000 sequences; 0.25 b: 8,000 sequences" in capsys.readouterr().out
    assert load_config(tmp_path / "c.yaml", {"data.mixture.a.weight": "3"}).data.mixture["a"].weight == 3
