"""scripts/scale_table.py: its tables have a line per case, and figures that are small but for other weights."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from looped.config import load_config
from looped.config.rules import RULES

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import scale_table
from scale_table import Job, compared, equal_bits, kinds_of, settings_of


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_a_config_for_its_own_kinds_of_data(rule, tmp_path):
    for kind in kinds_of(RULES[rule]):
        config = load_config(None, settings_of(argparse.Namespace(out=tmp_path, set=[]), rule, kind))
        assert (config.objective, config.kind.name) == (rule, kind)


def saved(folder, weight):
    step = folder / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    save_file({"w": torch.zeros(3)}, folder / "start.safetensors")
    for name in ("model", "ema", "optimizer"):
        save_file({"w": torch.tensor([0.0, -0.5, weight])}, step / f"{name}.safetensors")
    return Job(str(folder), {}, 1)


def test_a_difference_is_the_greatest_one_and_relative_to_the_greatest_way(tmp_path):
    one, other = saved(tmp_path / "one", 2.0), saved(tmp_path / "other", 2.25)
    assert compared(other, one) == "2.5e-01 | 1.2e-01"
    assert compared(one, one) == "0.0e+00 | 0.0e+00"
    assert equal_bits(one, one)
    assert not equal_bits(one, other)


@pytest.mark.slow
def test_the_script_prints_its_tables(tmp_path):
    command = [sys.executable, scale_table.__file__, "--out", tmp_path / "out", "--parts", "rules", "sent"]
    done = subprocess.run([*command, "--rules", "full"], capture_output=True, text=True, timeout=300, check=True)
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| `")]
    assert [line[0] for line in lines] == ["`full`"] * 4
    assert all(0 < float(figure) < 1e-3 for figure in lines[0][3:])
    assert len({tuple(line[2:]) for line in lines[1:]}) == 1  # whatever the depth
