"""One block alone: the same weights whatever the others do, none of theirs, and merged again the whole model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from looped.cli import main
from looped.config import dump_config, load_config
from looped.data.batch import Batch
from looped.errors import UserError
from looped.models.build import build
from looped.nn.rows import Rows
from looped.objectives import build_objective
from looped.objectives.blockwise import Blockwise
from looped.rng import StepRandom
from looped.training.checkpoint import list_checkpoints, module_tensors
from looped.training.heldout import heldout_figures, heldout_own
from looped.training.merge import merge
from looped.training.runs import load_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

N = 3
BLOCKS = {"objective": "blockwise", "blocks.num": N, "blocks.layers": [1, 2, 1], "model.num_core_layers": 4,
          "blocks.shared": "frozen", "training.budget": 3, "optim.ema_decay": 0.5, "evaluation.depths": [1, 3],
          "evaluation.num_samples": 1, "evaluation.sample_length": 4, "evaluation.num_problems": 4,
          "training.checkpoint_every": 1}


@pytest.fixture(scope="module")
def settings(tiny):
    return lambda **changes: tiny(**BLOCKS | changes)


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """A finished run of each block, trained one after the other, the last first."""
    folder = tmp_path_factory.mktemp("alone")
    for block in reversed(range(N)):
        train(settings(**{"blocks.alone": block}), folder / f"run{block}")
    return [folder / f"run{block}" for block in range(N)]


@pytest.fixture(scope="module")
def merged(runs):
    return merge(runs, runs[0].parent / "merged")


def saved(run, name="model"):
    return load_file(list_checkpoints(run)[0] / f"{name}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copied(runs, folder):
    return [shutil.copytree(run, folder / run.name, symlinks=True) for run in runs]


# ---- independence


def test_the_others_do_not_matter_whether_trained_before_or_never(runs, settings, tmp_path):
    """Block 2 has seen no other, block 0 came last, 1 is trained again where there is none."""
    train(settings(**{"blocks.alone": 1}), tmp_path / "run1")
    for name in ("model", "ema", "optimizer"):
        assert same(saved(runs[1], name), saved(tmp_path / "run1", name))


@pytest.mark.parametrize("block", range(N))
def test_it_is_what_the_whole_model_does_when_this_block_is_drawn(runs, settings, tmp_path, monkeypatch, block):
    monkeypatch.setattr(Blockwise, "sample_block", lambda self, random: block)
    train(settings(), tmp_path / "whole")
    for name in ("model", "ema", "optimizer"):
        whole, alone = saved(tmp_path / "whole", name), saved(runs[block], name)
        assert same({key: whole[key] for key in alone}, alone)
    assert same(saved(tmp_path / "whole", "optimizer"), saved(runs[block], "optimizer"))  # no other was trained


def test_it_is_what_the_whole_model_does_too_where_one_block_trains_the_shared_parts(settings, tmp_path, monkeypatch):
    changes = {"blocks.shared": "with-block", "blocks.shared_by": 1}
    monkeypatch.setattr(Blockwise, "sample_block", lambda self, random: 1)
    train(settings(**changes), tmp_path / "whole")
    train(settings(**changes | {"blocks.alone": 1}), tmp_path / "run1")
    whole, alone = saved(tmp_path / "whole"), saved(tmp_path / "run1")
    assert same({key: whole[key] for key in alone}, alone)


def test_an_interrupted_run_goes_on_where_it_was(runs, settings, tmp_path):
    run = copied(runs[1:2], tmp_path)[0]
    for folder in list_checkpoints(run)[:1]:
        shutil.rmtree(folder)
    train(settings(**{"blocks.alone": 1}), run)
    assert same(saved(run), saved(runs[1]))
    assert same(saved(run, "optimizer"), saved(runs[1], "optimizer"))


def losses(objective, block):
    """The loss of a block before and after the weights of every other one are changed."""
    batch = Batch.of(torch.randint(270, (4, 9), generator=torch.Generator().manual_seed(0)))
    before = objective.loss_of(block, batch, StepRandom(0, 0, count=4)).value
    with torch.no_grad():
        for other in {*range(N)} - {block}:
            for parameter in objective.model.recurrence.core.blocks[other].parameters():
                parameter.add_(1.0)
    return before, objective.loss_of(block, batch, StepRandom(0, 0, count=4)).value


@pytest.mark.parametrize("block", range(N))
def test_the_weights_of_all_other_blocks_do_not_move_its_loss(settings, block):
    before, after = losses(build_objective(settings(), build(settings(), 270)), block)
    assert torch.equal(before, after)


def test_a_tensor_that_two_blocks_share_is_seen(settings):
    """The control: a planted leak."""
    objective = build_objective(settings(), build(settings(), 270))
    blocks = objective.model.recurrence.core.blocks
    blocks[1].layers[0].mlp.out.weight = blocks[0].layers[0].mlp.out.weight
    before, after = losses(objective, 1)
    assert not torch.equal(before, after)


# ---- nothing of the others


@pytest.mark.parametrize("block", range(N))
def test_the_first_weights_are_those_of_the_whole_and_absent_blocks_have_none(settings, block):
    config = settings(**{"blocks.alone": block})
    whole, alone = (build_objective(c, build(c, 270)) for c in (settings(), config))
    theirs, own = module_tensors(whole), module_tensors(alone)
    assert same({name: theirs[name] for name in own}, own)
    absent = [other for other in range(N) if other != block]
    assert theirs.keys() - own.keys() == set().union(*(whole.names_of(other) for other in absent))
    sizes = [sum(p.numel() for p in core.parameters()) for core in whole.model.recurrence.core.blocks]
    assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in whole.parameters()) - sum(
        sizes[other] for other in absent)


def test_checkpoints_hold_one_block_and_no_optimiser_state_of_what_is_frozen(runs, settings):
    sizes = {}
    for block, run in enumerate(runs):
        weights, slots = saved(run), saved(run, "optimizer")
        mine = {name for name in weights if f"core.blocks.{block}." in name}
        assert {name for name in weights if "core.blocks." in name} == mine
        assert {name.rpartition(".")[0] for name in slots} == mine
        sizes[block] = sum(file.stat().st_size for file in list_checkpoints(run)[0].iterdir())
    assert sizes[0] == pytest.approx(sizes[2], rel=0.01)
    assert sizes[1] > 1.3 * sizes[0]  # two layers


def test_whoever_asks_an_absent_block_is_told_so(settings):
    config = settings(**{"blocks.alone": 1})
    objective = build_objective(config, build(config, 270)).eval()
    x, z = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, 4)
    with pytest.raises(UserError, match=r"block 0 of the core is not here .* looped merge"):
        objective.logits(x, z, torch.full((1,), 20.0, dtype=torch.float64))
    with pytest.raises(UserError, match="block 0 of the core is not here"):
        objective.model.step(torch.zeros(1, 8, 16), torch.zeros(1, 8, 16), None, Rows(block=0))


# ---- measuring one


def test_a_run_of_one_block_is_measured_by_its_own_loss_and_told_what_needs_the_others(runs, capsys):
    assert main(["eval", str(runs[1]), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    logged = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert row == {"block": 1, "step": 3, "loss": logged[-1]["loss"], "device": "cpu", "dtype": "fp32"}
    assert logged[-1]["kind"] == "heldout"
    assert main(["info", str(runs[1])]) == 0
    assert "of which block 1 alone is here" in capsys.readouterr().out
    for command in (["eval", str(runs[1]), "--depths", "1"], ["generate", str(runs[1])]):
        assert main(command) == 2
        assert "merge the runs of all blocks with looped merge" in capsys.readouterr().err


def test_the_losses_of_blocks_alone_add_up_to_that_of_the_whole(runs, merged):
    whole = load_run(merged)
    own = [heldout_own(run.objective, run.data, run.config)["loss"] for run in map(load_run, runs)]
    assert heldout_figures(whole.objective, whole.data, whole.config)["loss"] == pytest.approx(sum(own) / N, rel=1e-6)


# ---- merging


def test_a_merged_run_holds_what_its_parts_hold(runs, merged):
    for name in ("model", "ema", "optimizer"):
        whole, parts = saved(merged, name), [saved(run, name) for run in runs]
        assert whole.keys() == set().union(*parts)
        assert all(torch.equal(whole[key], part[key]) for part in parts for key in part)
    config = load_config(merged / "config.yaml")
    assert config.blocks.alone is None
    assert config == load_config(runs[0] / "config.yaml").replace(**{"blocks.alone": None})
    assert json.loads((merged / "stamp.json").read_text())["merged"] == [str(run) for run in runs]


def test_a_merged_run_is_measured_described_and_finished(merged, capsys):
    assert main(["eval", str(merged)]) == 0
    assert (merged / "plots" / "partition.png").exists()
    assert main(["info", str(merged)]) == 0
    assert "step 3 of 3 steps" in capsys.readouterr().out
    assert main(["generate", str(merged), "--num-tokens", "2", "--depth", "3"]) == 0
    assert main(["train", str(merged / "config.yaml")]) == 0  # nothing left to do
    assert "done: 3 steps" in capsys.readouterr().out


def test_runs_on_a_task_and_on_images_are_merged(settings, tmp_path):
    pytest.importorskip("sklearn")
    images = {"images.source": "digits", "model.patch_size": 4, "evaluation.batch_size": 180}
    for name, changes in {"task": {"task.name": "prefix-sums"}, "images": images}.items():
        for block in range(N):
            train(settings(**changes | {"blocks.alone": block, "denoise.context": "inject", "training.budget": 1}),
                  tmp_path / name / str(block))
        assert main(["merge", *(str(tmp_path / name / str(block)) for block in (2, 0, 1)), "--out",
                     str(tmp_path / name / "whole")]) == 0
        assert main(["eval", str(tmp_path / name / "0")]) == 0
        assert main(["eval", str(tmp_path / name / "whole"), "--depths", "3"]) == 0


def test_shared_parts_that_one_block_trained_are_read_by_the_others_and_kept(settings, tmp_path):
    changes = {"blocks.shared": "with-block", "blocks.shared_by": 1}
    train(settings(**changes | {"blocks.alone": 1}), tmp_path / "run1")
    for block in (0, 2):
        train(settings(**changes | {"blocks.alone": block, "blocks.shared_from": str(tmp_path / "run1")}),
              tmp_path / f"run{block}")
    merge([tmp_path / f"run{block}" for block in range(N)], tmp_path / "whole")
    source = saved(tmp_path / "run1", "ema")
    shared = [name for name in source if "core.blocks." not in name]
    first = module_tensors(build_objective(settings(**changes), build(settings(**changes), 270)))
    assert not all(torch.equal(first[name], source[name]) for name in shared)  # they have learned
    for run in ("run0", "run2", "whole"):
        for name in ("model", "ema"):
            found = saved(tmp_path / run, name)
            assert all(torch.equal(found[key], source[key]) for key in shared)
    stranger = settings(**changes | {"blocks.alone": 2, "blocks.shared_from": str(tmp_path / "run0")})
    with pytest.raises(UserError, match="is the run of block 0, and the shared parts are trained with block 1"):
        train(stranger, tmp_path / "stranger")


# ---- refusals


def refused(runs, out, match):
    with pytest.raises(UserError, match=match) as error:
        merge(runs, out)
    assert "\n" not in str(error.value)
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".tmp")] == []


def test_missing_and_doubled_blocks_are_named(runs, tmp_path):
    refused(runs[:1], tmp_path / "out", "no run of blocks 1, 2 of 3")
    refused([*runs, runs[1]], tmp_path / "out", "both runs of block 1")
    refused([], tmp_path / "out", "needs the run of each block")


def test_an_out_that_exists_is_left_alone(runs, tmp_path):
    with pytest.raises(UserError, match="exists; choose another --out"):
        merge(runs, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_runs_of_another_config_other_data_or_none_are_named(runs, merged, settings, tmp_path, text_folder):
    other = tmp_path / "other"
    train(settings(**{"blocks.alone": 0, "optim.lr": 1e-3}), other)
    refused([other, *runs[1:]], tmp_path / "out", "run1 was trained with optim.lr 0.002 and .*other with 0.001")
    refused([*runs, merged], tmp_path / "out", "is not a run of a single block")
    refused([*runs[1:], tmp_path], tmp_path / "out", "is not a run")
    text = tmp_path / "text"
    shutil.copytree(text_folder, text)
    (text / "0.txt").write_text((text / "1.txt").read_text())
    train(settings(**{"blocks.alone": 0, "data.path": [str(text)]}), tmp_path / "elsewhere")
    refused([tmp_path / "elsewhere", *runs[1:]], tmp_path / "out", "were trained on different data")


def test_a_run_with_other_shared_parts_is_named(runs, settings, tmp_path):
    train(settings(**{"blocks.alone": 0, "seed": 1}), tmp_path / "run0")
    text = (tmp_path / "run0" / "config.yaml").read_text()
    (tmp_path / "run0" / "config.yaml").write_text(text.replace("seed: 1", "seed: 0"))
    refused([tmp_path / "run0", *runs[1:]], tmp_path / "out",
            "the shared part '.*' of .*run1 differs from that of .*run0")


def test_unfinished_and_damaged_runs_are_named(runs, tmp_path):
    mine = copied(runs, tmp_path)
    weights = list_checkpoints(mine[0])[0] / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(mine, tmp_path / "out", "step-00000003 is damaged: model.safetensors")
    weights.write_bytes(whole)
    shutil.rmtree(list_checkpoints(mine[2])[0])
    refused(mine, tmp_path / "out", "run2 is unfinished: 2 of its budget of 3 steps .* again to finish it")
    shutil.rmtree(mine[2] / "checkpoints")
    refused(mine, tmp_path / "out", "run2 has no checkpoint yet")


@pytest.mark.parametrize(("changes", "why"), [
    ({"blocks.alone": 3}, "alone 3 is not one of num 3 blocks; give 0 to 2"),
    ({"blocks.alone": 1, "blocks.shared": "trained"}, "set blocks.shared to frozen or with-block"),
    ({"blocks.alone": 1, "blocks.shared": "with-block"}, "train that block first, and set blocks.shared_from"),
    ({"blocks.alone": 0, "blocks.shared_from": "run"}, "shared_from run needs shared with-block .* leave it out"),
    ({"blocks.shared": "with-block", "blocks.shared_by": 3}, "shared_by 3 is not one of num 3"),
    ({"blocks.alone": 0, "objective": "ar"}, "blocks.alone 0 is for objective blockwise"),
    ({"blocks.alone": 0, "training.sample_every": 5}, "training.sample_every 5 .* set it to 0"),
])
def test_settings_that_do_not_fit_are_named(settings, changes, why):
    with pytest.raises(UserError, match=why):
        settings(**changes)


# ---- the command line


def test_a_block_has_a_folder_of_its_own_and_its_config_repeats_it(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.yaml").write_text(dump_config(settings(**{"training.budget": 1})))
    assert main(["train", "three.yaml", "--block", "2"]) == 0
    assert load_config("runs/three-block2/config.yaml").blocks.alone == 2
    assert main(["train", "runs/three-block2/config.yaml"]) == 0
    assert "the run is runs/three-block2" in capsys.readouterr().out.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["three-block2"]
    for flags, why in {("--block", "x"): "neither the number of a block nor rank",
                       ("--block", "3"): "alone 3 is not one of num 3",
                       ("--block", "rank"): "no launcher has set one; start it with torchrun",
                       ("--block", "1", "--blocks.alone", "1"): "set the same value"}.items():
        assert main(["train", "three.yaml", *flags]) == 2
        assert why in capsys.readouterr().err


def test_a_launcher_starts_a_block_a_process_and_training_at_the_same_time_does_not_matter(runs, settings, tmp_path):
    """Each is what it is where it was trained while no other was."""
    (tmp_path / "config.yaml").write_text(dump_config(settings()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "looped.cli", "train", "config.yaml", "--block", "rank"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False,
                          env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-2000:]
    for block, run in enumerate(runs[:2]):
        for name in ("model", "ema", "optimizer"):
            assert same(saved(tmp_path / "runs" / f"config-block{block}", name), saved(run, name))


def test_a_process_of_a_launcher_has_a_run_of_its_own_and_more_than_blocks_are_refused(settings, tmp_path, monkeypatch,
                                                                                       capsys):
    (tmp_path / "config.yaml").write_text(dump_config(settings(**{"training.budget": 1})))
    command = ["train", str(tmp_path / "config.yaml"), "--block", "rank", "--run", str(tmp_path / "run")]
    for size, code in (("4", 2), ("2", 0)):
        for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": size}.items():
            monkeypatch.setenv(name, value)
        assert main(command) == code
        assert len(list(tmp_path.glob("run*"))) == (code == 0)
    assert "4 processes were started for blocks.num 3 blocks" in capsys.readouterr().err
    assert load_config(tmp_path / "run-block1" / "config.yaml").blocks.alone == 1
