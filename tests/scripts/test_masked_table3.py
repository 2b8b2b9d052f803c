"""The table of masked diffusion: every figure in its place, both arms for real on a tiny text, refusals first."""

import sys

import pytest

from looped.cli import split_settings
from looped.config import load_config
from looped.config.arms import parse_arms


@pytest.fixture
def script(load):
    return load("masked_table3")


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["masked_table3", *map(str, arguments)])
    return script.main()


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_the_arms_are_the_same_layers_in_three_blocks_and_in_one(script, scale):
    size = script.SCALES[scale]
    arms = parse_arms(load_config(script.BASE, size.flags), ",".join(script.arms_of(size)))
    twin, blocks = (arm.config for arm in arms)
    assert {arm.name: arm.config.optim.lr for arm in arms} == size.rates
    assert twin == blocks.replace(**{"blocks.num": 1, "optim.lr": twin.optim.lr})
    assert (blocks.blocks.num, twin.blocks.num) == (3, 1)


def test_figures_stand_where_they_belong(script):
    rows = []
    for number, arm in enumerate(script.ARMS, 1):
        for seed in (0, 1):
            who = {"kind": "figure", "arm": arm, "seed": seed}
            rows.append(who | {"metric": "bits_per_byte_bound", "mean": number + seed / 10})
            rows += [who | {"metric": "bits_per_byte", "depth": depth, "mean": number + depth / 100}
                     for depth in (1, 3, 8, 64)]
            rows.append({"kind": "cost", "arm": arm, "seed": seed, "step": 10 * number, "layer_forwards": 1234.0,
                         "seconds": 56.0 * number})
    rows.append({"kind": "difference", "arm": "three-blocks", "to": "end-to-end", "mean": -0.25, "ci_low": -0.5,
                 "ci_high": 0.125, "num_seeds": 2})
    text = script.report(rows)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith(("| end", "| three"))]
    assert lines == [
        ["end-to-end", "1.050 ± 0.071", "1.010 ± 0.000", "1.080 ± 0.000", "1.640 ± 0.000", "10", "1,234", "56", "1.56"],
        ["three-blocks", "2.050 ± 0.071", "2.010 ± 0.000", "2.080 ± 0.000", "2.640 ± 0.000", "20", "1,234", "112",
         "1.45"]]
    assert "-0.250 nats a token, 95 % interval over texts [-0.500, +0.125]" in text


@pytest.mark.parametrize(("arguments", "said"), [
    (["--scale", "paper"], "--scale paper needs a text of its own"),
    (["--optim.lr", "1e-3"], "--optim.lr 1e-3 would be lost, since every arm of this script has its own; leave it out"),
    (["--sceds", "3"], "--sceds 3 is neither an option of this script nor a setting")])
def test_what_cannot_be_done_is_said_before_anything_is_trained(script, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(script.subprocess, "call", lambda command: pytest.fail("it trains"))
    assert run(script, monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err


def test_settings_of_the_user_come_after_those_of_the_scale(script, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(script.subprocess, "call", lambda command: seen.append(command) or 7)
    assert run(script, monkeypatch, "--out", tmp_path, "--evaluation.levels", "3", "--seeds", "1") == 7
    (command,) = seen
    rest, settings = split_settings(command[4:])
    assert settings["evaluation.levels"] == "3"
    assert settings["training.clock"] == "processor"
    assert rest[rest.index("--amount") + 1] == str(script.SCALES["cpu"].layer_forwards)


@pytest.mark.slow
def test_both_arms_train_and_the_table_is_written(script, monkeypatch, tmp_path, capfd):
    (tmp_path / "text").mkdir()
    for part in range(6):
        lines = [f"def f{i}(x):\n    return x * {i} + {i * i % 17}  # {part}\n\n" for i in range(100)]
        (tmp_path / "text" / f"{part}.txt").write_text("".join(lines))
    settings = {"data.path": tmp_path / "text", "data.cache_dir": tmp_path / "tokens", "data.vocab_size": 300,
                "data.length": 16, "data.heldout": 0.2, "model.width": 16, "model.num_heads": 2,
                "model.num_core_layers": 3, "training.batch_size": 2, "training.num_evals": 1,
                "evaluation.num_sequences": 2, "evaluation.num_samples": 2, "evaluation.sample_length": 2,
                "evaluation.prompt_length": 4, "evaluation.levels": 2}
    out = tmp_path / "out"
    assert run(script, monkeypatch, "--out", out, "--seeds", "1", "--layer-forwards", "60",
               *(f"--{name}={value}" for name, value in settings.items())) == 0
    table = (out / "masked_table3.md").read_text()
    assert table in capfd.readouterr().out
    end_to_end, blocks = ([cell.strip() for cell in line.split("|")][6:8] for line in table.splitlines()
                          if line.startswith(("| end", "| three")))
    assert (end_to_end, blocks) == (["4", "72"], ["10", "60"])  # a step of two texts: 18 layer forwards, and 6
