"""The scripts of tables 4 and 5: tiny models on a tiny text, every process for real; every figure in its place."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lines_of(table):
    """The cells of the lines below the header."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
             if line.startswith("|")]
    return lines[2:]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "budget", "lines"), [
    ("huginn_table5", 64, [["truncated, 5 epochs", "1"], ["truncated, 5 epochs", "4"], ["truncated, 5 epochs", "32"],
                           ["denoise, 15 epochs", "1"], ["denoise, 15 epochs", "4"], ["denoise, 15 epochs", "32"]]),
    ("blocks_table4", 200, [["end-to-end", "4"], ["four-blocks", "4"], ["four-blocks", "8"], ["four-blocks", "16"]])])
def test_all_train_and_are_judged_and_the_table_is_printed(tmp_path, script, budget, lines):
    text = "".join(f"def f{i}(x):\n    return x * {i} + {i * i % 17}  # number {i}\n\n" for i in range(600))
    (tmp_path / "text").mkdir()
    for part in range(6):
        (tmp_path / "text" / f"{part}.txt").write_text(text[part * len(text) // 6 : (part + 1) * len(text) // 6])
    settings = {"data.path": tmp_path / "text", "data.cache_dir": tmp_path / "tokens", "data.vocab_size": 300,
                "data.length": 16, "data.heldout": 0.2, "model.width": 16, "model.num_heads": 2, "recurrence.mean": 2,
                "recurrence.backprop": 1, "training.batch_size": 4, "evaluation.num_sequences": 4,
                "evaluation.num_samples": 20, "evaluation.sample_length": 8, "evaluation.prompt_length": 4}
    command = [sys.executable, ROOT / f"scripts/reproduce/{script}.py", "--out", tmp_path / "out", "--seeds", "1",
               "--budget", budget, *(f"--{name}={value}" for name, value in settings.items())]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "out" / f"{script}.md").read_text()
    assert [line[:2] for line in lines_of(table)] == lines
    assert all(float(cell) > 0 for line in lines_of(table) for cell in line[2:])
    assert "perplexity, ar-1000" in table
    assert "The paper, on LM1B" in table
    assert table in done.stdout


@pytest.fixture
def table(load):
    return load("blocks_table4").TABLE


def test_figures_stand_where_they_belong(table):
    rows = [{"writer": name, "seed": seed, "depth": depth, "judge": judge, "metric": metric,
             "mean": start + number + depth / 100 + seed / 10}
            for number, (name, writer) in enumerate(table.writers.items()) for depth in writer.depths
            for seed in (0, 1) for judge, add in (("one", 0), ("two", 2))
            for metric, start in (("judged_nats", add), ("mauve", 10), ("distinct_2", 20), ("nats_per_token", 30))]
    found = {tuple(line[:2]): [float(cell.split()[0]) for cell in line[2:]]
             for line in lines_of(table.report(rows, ["one", "two"], "gpt2-large", 2))}
    wanted = [11.13, *(sum(math.exp(add + 1.08 + seed / 10) for seed in (0, 1)) / 2 for add in (0, 2)), 21.13, 31.13]
    assert found["four-blocks", "8"] == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_the_blocks_are_the_layers_of_the_twin_and_the_settings_are_some(load, table, scale, tmp_path):
    import argparse

    from looped.cli import split_settings
    from looped.config import load_config

    args = argparse.Namespace(budget=None)
    configs = {}
    for name, writer in table.writers.items():
        command = table.train(table.scales[scale], args, writer, 0, tmp_path, {})
        _, settings = split_settings(command[4:])
        configs[name] = load_config(command[4], settings)
    blocks, twin = configs["four-blocks"], configs["end-to-end"]
    assert table.writers["end-to-end"].depths == (twin.blocks.num,), "one pass through all blocks, as it was trained"
    assert (blocks.blocks.num, blocks.step_layers * 4) == (4, blocks.model.num_core_layers)
    assert twin == blocks.replace(objective="ar")
