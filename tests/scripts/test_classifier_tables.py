"""The tables of one classifier trained in parts: every rule applies, figures stand where they belong."""

import json
import sys
from pathlib import Path

import pytest

from looped.config import load_config
from looped.config.arms import parse_arms

FOLDER = {"images.path": "somewhere"}
TINY = {"model.width": 16, "model.num_heads": 2, "model.ffn_width": 16, "model.num_core_layers": 3,
        "model.patch_size": 4, "denoise.cond_width": 8, "training.num_evals": 2, "evaluation.batch_size": 180}


@pytest.fixture
def script(load):
    return load("classifier_tables")


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """`run(compare, *arguments)`: the exit code and the text of the table, `compare` in the place of the process: it is
    given the folder and the command, and returns an exit code."""
    def go(compare, *arguments):
        def process(command, check):
            folder = Path(command[command.index("--out") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            return type("Done", (), {"returncode": compare(folder, command)})

        monkeypatch.setattr(script.subprocess, "run", process)
        monkeypatch.setattr(sys, "argv", ["classifier_tables", "--out", str(tmp_path / "out"), *arguments])
        code, path = script.main(), tmp_path / "out/classifier_tables.md"
        return code, path.read_text() if path.exists() else None

    return go


def made_up(arm, number):
    shares = [{"kind": "share", "arm": arm, "at": at, "depth": depth, "mean": number / 10 + depth / 1000, "sd": 0.01,
               "num": 2} for at, depth in (("trained", 3), ("best", 6), ("deepest", 30))]
    equal = [{"kind": "equal", "arm": arm, "budget": budget, "spent": spent, "mean": number / 10 + 0.05, "sd": 0.02,
              "num": 2} for budget, spent in (("seconds", 40.0), ("layer_forwards", 5000.0))]
    return [*shares, *equal, *({"kind": "cost", "arm": arm, "seed": seed} for seed in range(2))]


def all_well(*arms):
    def compare(folder, command):
        rows = [row for number, arm in enumerate(arms, 1) for row in made_up(arm, number)]
        (folder / "compare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0

    return compare


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_every_rule_applies_to_all_images_with_the_same_layers(script, scale):
    for name in script.SCALES[scale].sets:
        config = load_config(script.BASE, script.flags_of(script.SCALES[scale], name, FOLDER))
        configs = [arm.config for arm in parse_arms(config, script.arms_text(list(script.RULES)))]
        assert len(configs) == len(script.RULES) == 7
        assert len({(c.model.num_core_layers, c.model.width, c.model.patch_size) for c in configs}) == 1
        assert {c.blocks.num for c in configs} == {1, 3}


def test_figures_stand_under_their_images_beside_the_papers(run):
    code, text = run(all_well("end-to-end", "noprop-ct"), "--rules", "end-to-end,noprop-ct", "--seeds", "2",
                     "--images.path", "here")
    assert code == 0
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")]
                         for line in text.split("\n\n")[1].splitlines()]
    assert header == ["rule", "digits: best depth", "digits: at equal seconds", "fashion: best depth",
                      "fashion: at equal seconds", "ViT, table 1", "CNN, table 6"]
    assert lines[0] == ["end-to-end", "0.106 ± 0.010 (6)", "0.150 ± 0.020", "0.106 ± 0.010 (6)", "0.150 ± 0.020",
                        "60.25 %", "47.80 %"]
    assert lines[1][1:] == ["0.206 ± 0.010 (6)", "0.250 ± 0.020", "0.206 ± 0.010 (6)", "0.250 ± 0.020", "-", "21.31 %"]
    assert "digits: 5,000 layer forwards, 40 seconds." in text


def test_what_has_not_finished_says_so_and_the_next_images_are_measured(run):
    def compare(folder, command):
        return 2 if folder.name == "digits" else all_well("noprop-dt")(folder, command)

    code, text = run(compare, "--rules", "noprop-dt,noprop-fm", "--seeds", "2", "--images.path", "here")
    assert code == 2
    line = next(line for line in text.splitlines() if line.startswith("| noprop-dt"))
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["not finished", "not finished", "0.106 ± 0.010 (6)"]
    assert next(line for line in text.splitlines() if line.startswith("| noprop-fm")).count("not finished") == 4


def test_what_is_stopped_goes_no_further(run):
    asked = []
    code, text = run(lambda folder, _: (asked.append(folder.name), 130)[1], "--images.path", "here")
    assert (code, text, asked) == (130, None, ["digits"])


def test_the_command_has_the_settings_of_the_images_below_those_of_the_user(run):
    commands = []

    def compare(folder, command):
        commands.append(command)
        return all_well("noprop-dt")(folder, command)

    run(compare, "--rules", "noprop-dt", "--images.path", "here", "--model.width=32", "--layer-forwards", "700")
    digits, fashion = commands
    assert "--images.path=here" in fashion
    assert not any(word.startswith("--images.path") for word in digits)
    assert {"--images.source=idx", "--images.max_heldout=1000", "--model.patch_size=7", "--model.width=32"} < {*fashion}
    assert fashion[fashion.index("--amount") + 1] == "700"
    assert fashion[fashion.index("--objectives") + 1].startswith("noprop-dt=noprop-dt blocks.num=3 optim.lr=")


@pytest.mark.parametrize(("arguments", "why"), [
    ([], "fashion needs the folder of its IDX files; give --images.path"),
    (["--sets", "digit"], "did you mean 'digits'"), (["--sets", "digits", "--rules", "noprop"], "is not among"),
    (["--sets", "digits", "--model.widht", "3"], "did you mean 'width'"), (["--second", "3"], "neither an option"),
    (["--sets", "digits", "--optim.lr=1e-3"], "--optim.lr 1e-3 would be lost")])
def test_bad_input_is_one_sentence_and_nothing_is_trained(run, arguments, why, capsys):
    code, text = run(lambda *_: pytest.fail("trained"), *arguments)
    assert (code, text) == (2, None)
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_real_run_fills_every_cell(script, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    flags = [f"--{name}={json.dumps(value)}" for name, value in TINY.items()]
    monkeypatch.setattr(sys, "argv", ["classifier_tables", "--out", str(tmp_path), "--sets", "digits", "--seeds", "1",
                                      "--layer-forwards", "3000", *flags])
    assert script.main() == 0
    text = (tmp_path / "classifier_tables.md").read_text()
    assert "not finished" not in text
    assert all(f"\n| {rule} " in text for rule in script.RULES)
