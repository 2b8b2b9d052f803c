"""The reproduction scripts run end to end: tiny models on a tiny text, every process for real."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_table_5_trains_both_rules_and_a_judge_and_prints_the_table(tmp_path):
    text = "".join(f"def f{i}(x):\n    return x * {i} + {i * i % 17}  # number {i}\n\n" for i in range(600))
    (tmp_path / "text").mkdir()
    for part in range(6):
        (tmp_path / "text" / f"{part}.txt").write_text(text[part * len(text) // 6 : (part + 1) * len(text) // 6])
    settings = {"data.path": tmp_path / "text", "data.cache_dir": tmp_path / "tokens", "data.vocab_size": 300,
                "data.length": 16, "data.heldout": 0.2, "model.width": 16, "model.num_heads": 2, "recurrence.mean": 2,
                "recurrence.backprop": 1, "training.batch_size": 4, "evaluation.num_sequences": 4,
                "evaluation.num_samples": 20, "evaluation.sample_length": 8, "evaluation.prompt_length": 4}
    command = [sys.executable, ROOT / "scripts/reproduce/huginn_table5.py", "--out", tmp_path / "out", "--epoch", "64",
               *(f"--{name}={value}" for name, value in settings.items())]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "out" / "table5.md").read_text()
    for rule, epochs in (("truncated", 5), ("denoise", 15)):
        for depth in (1, 4, 32):
            assert [cell.strip() for cell in next(line for line in table.splitlines() if line.startswith(f"| {rule}")
                                                  and f"| {depth:>5} |" in line).split("|")[1:5]] == [
                rule, str(epochs), "0", str(depth)]
    assert "The paper, on LM1B" in table
    assert table in done.stdout
