"""Validation by several processes: each measures a part of the batches, and the figures are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from looped.config import dump_config, load_config
from looped.training.heldout import heldout_samples
from looped.training.logs import TIMING, read_metrics
from looped.training.runs import load_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")

TEXT = {"evaluation.num_sequences": 5, "evaluation.batch_size": 2, "evaluation.levels": 4, "training.budget": 2}
SMALL = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "denoise.context": "inject",
         "denoise.cond_width": 8, "recurrence.mean": 2, "training.budget": 2, "training.threads": 1,
         "evaluation.depths": [1, 2]}
TASK = SMALL | {"task.name": "prefix-sums", "task.difficulty": [2, 4], "denoise.target.dim": 4,
                "recurrence.backprop": 1, "evaluation.num_problems": 10, "evaluation.batch_size": 4}
IMAGES = SMALL | {"images.source": "digits", "model.num_prelude_layers": 0, "model.num_coda_layers": 0,
                  "model.patch_size": 4, "evaluation.batch_size": 50}
MADE = {"images.goal": "generate", "model.injection": "none", "denoise.noise": "paper", "denoise.weight": "edm",
        "denoise.solver": "heun", "denoise.schedule": "karras", "evaluation.sample_depths": [2]}
BLOCKS = {"blocks.num": 2, "model.num_core_layers": 2}
TEXTS = {"averaged": {"objective": "full", "optim.ema_decay": 0.9}, "sharded": {"objective": "full"},
         "own": {"objective": "full"}, "denoise": {}}
MORE = {"ar": {"objective": "ar"}, "masked": {"objective": "masked"},
        "documents in blocks": {"denoise.block_size": 2}, "bf16": {"training.precision": "bf16"},
        "one block": {"objective": "blockwise", "blocks.alone": 1, "blocks.shared": "frozen"} | BLOCKS}
OTHERS = {"task": TASK | {"objective": "full"}, "images": IMAGES | {"objective": "full"},
          "one batch": TASK | {"objective": "full", "evaluation.batch_size": 256}}
MORE_OTHERS = {"answers": TASK | {"objective": "denoise"}, "made images": IMAGES | MADE | {"objective": "denoise"},
               "layers": IMAGES | {"objective": "forward-forward", "model.num_core_layers": 2,
                                   "model.injection": "none"}}


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    """`evaluated(texts, others, processes)`: (folder of the runs, batches that each process measured by run), of runs
    trained and evaluated by one process, and evaluated again by several."""
    def go(texts, others, processes):
        folder = tmp_path_factory.mktemp("divided")
        configs = {name: tiny(**TEXT | changes) for name, changes in texts.items()}
        configs |= {name: load_config(None, settings) for name, settings in others.items()}
        for name, config in configs.items():
            train(config, folder / name, quiet=True)
        again = {name: config.replace(**{"training.shard": "fsdp" if name == "sharded" else "none"})
                 for name, config in configs.items()}
        (folder / "runs.json").write_text(json.dumps(
            {name: yaml.safe_load(dump_config(config)) for name, config in again.items()}), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                   Path(__file__).parent / "divided_runs.py", folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-6000:]
        return folder, [json.loads((folder / f"measured-{rank}.json").read_text(encoding="utf-8"))
                        for rank in range(processes)]

    return go


@pytest.fixture(scope="module")
def by_two(evaluated):
    return evaluated(TEXTS, OTHERS, 2)


def check_same_figures(run):
    by_one, by_several = [{name: value for name, value in line.items() if name not in TIMING}
                          for line in read_metrics(run) if line["kind"] == "heldout"][-2:]
    assert by_one == by_several
    assert by_one.keys() & {"loss", "solved", "accuracy"}


@pytest.mark.parametrize("name", [name for name in [*TEXTS, *OTHERS] if name != "one batch"])
def test_the_figures_are_those_of_one_process_to_the_last_bit(by_two, name):
    check_same_figures(by_two[0] / name)


def sample_of_one(run):
    """The sample that one process makes of a run."""
    loaded = load_run(run)
    with torch.no_grad():
        made = heldout_samples(loaded.objective, loaded.data, loaded.config)
    return made if isinstance(made, str) else made.tolist()


@pytest.mark.parametrize("name", ["averaged", "sharded", "denoise", "task", "images"])
def test_samples_are_those_of_one_process(by_two, name):
    made = json.loads((by_two[0] / f"sample-{name}.json").read_text(encoding="utf-8"))
    assert made == sample_of_one(by_two[0] / name)
    assert "depth" in made


def test_a_batch_that_is_cut_has_the_figures_of_the_whole_up_to_rounding(by_two):
    by_one, by_several = [line for line in read_metrics(by_two[0] / "one batch") if line["kind"] == "heldout"]
    for name in ("solved", "solved_at_1", "best_depth"):
        assert by_several[name] == pytest.approx(by_one[name])


def test_each_process_measures_every_other_batch(by_two):
    first, second = by_two[1]
    for name in ("averaged", "sharded", "denoise"):  # 3 batches for the loss, and 3 for `next_token`
        assert (first[name], second[name]) == (4, 2)
    assert (first["task"], second["task"]) == (2, 1)
    assert (first["one batch"], second["one batch"]) == (1, 1)
    assert first["images"] + second["images"] >= 2
    assert abs(first["images"] - second["images"]) <= 1


def test_a_function_of_the_users_is_called_by_the_first_process_alone(by_two):
    first, second = by_two[1]
    assert (first["own"], second["own"]) == (1, 0)


@pytest.mark.slow
def test_so_it_is_for_other_rules_and_three_processes(evaluated):
    folder, counts = evaluated(MORE, MORE_OTHERS, 3)
    for name in [*MORE, *MORE_OTHERS]:
        check_same_figures(folder / name)
        assert all(each[name] for each in counts[:2]), name
    for name in ("masked", "made images"):
        sample = json.loads((folder / f"sample-{name}.json").read_text(encoding="utf-8"))
        assert sample == sample_of_one(folder / name)
