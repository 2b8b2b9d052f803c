"""A run gone on with: a larger budget gives the run of that budget, and what decides no weight may change."""

import json
import warnings

import pytest
import torch
from same_runs import assert_same, weights

from looped.config import load_config
from looped.errors import UserError
from looped.training.block_runs import Part, check_fits
from looped.training.callbacks import Callback
from looped.training.checkpoint import list_checkpoints, step_of
from looped.training.logs import _first_stamp
from looped.training.resume_rules import FREE_AT_RESTART, Change, differences
from looped.training.runs import load_run, open_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

AVERAGED = {"denoise.noise.distribution": "adaptive", "optim.ema_decay": 0.9, "training.accumulation": 2}
MUON = {"objective": "truncated", "optim.name": "muon", "optim.warmup_steps": 6}
TOKENS = {"training.budget_unit": "tokens"}
LATE = {"objective": "full", "recurrence.mean": 2, "recurrence.from_share": 0.25}
STAGED = {"objective": "full", "recurrence.mean": 3, "recurrence.stages": [{"until": 0.25, "mean": 2}]}
PER_STEP = {"steps": 1, "tokens": 4 * 8, "layer-forwards": 4 * 6}
"""Of the tiny run: a batch of 4 sequences of 8 tokens, and 6 layer forwards each."""

FREE = {"training.log_every": 1, "training.eval_every": 3, "training.num_evals": 2, "training.sample_every": 5,
        "training.checkpoint_every": 1, "training.keep_checkpoints": 3,
        "training.background_saves": False, "training.wandb": "'off'",
        "training.threads": 1, "training.other_data": True, "training.lost_after": 30.0, "evaluation.num_sequences": 2,
        "evaluation.depths": [1]}

IMAGES = {"images.source": "digits", "images.max_train": 64, "images.max_heldout": 32, "model.patch_size": 4,
          "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "model.num_prelude_layers": 0,
          "model.num_coda_layers": 0, "denoise.context": "inject", "denoise.context_dropout": 0.5,
          "denoise.cond_width": 8, "training.batch_size": 4, "training.budget": 6, "training.log_every": 2,
          "training.eval_every": 4, "training.checkpoint_every": 2, "training.threads": 1, "training.sample_every": 0,
          "evaluation.depths": [1, 2]}
FREE_OF_IMAGES = {"denoise": {"denoise.guidance": 2.0}, "noprop-ct": {"noprop.solver": "posterior"}}


def long_enough(tiny, schedule, budget, **changes):
    """Lines, evaluations and checkpoints fall on the end of a run of 8 steps."""
    return tiny(**{"optim.schedule": schedule, "optim.decay_fraction": 0.5, "training.log_every": 2,
                   "training.eval_every": 4, "training.keep_checkpoints": 9, "training.budget": budget, **changes})


@pytest.mark.filterwarnings("ignore:run .* resumes from step")
@pytest.mark.parametrize(("changes", "schedule"), [
    (AVERAGED, "constant"), (AVERAGED, "wsd"), (MUON, "wsd"), (AVERAGED | TOKENS, "wsd"), (LATE, "constant"),
    pytest.param(STAGED, "wsd", marks=pytest.mark.slow),
    pytest.param(MUON, "constant", marks=pytest.mark.slow),
    pytest.param(AVERAGED | TOKENS, "constant", marks=pytest.mark.slow)],
    ids=["averaged-constant", "averaged-wsd", "muon-wsd", "tokens-wsd", "late-constant", "staged-wsd", "muon-constant",
         "tokens-constant"])
def test_a_finished_run_gone_on_with_is_bit_for_bit_the_run_of_the_larger_budget(tmp_path, tiny, changes, schedule):
    step = PER_STEP[changes.get("training.budget_unit", "steps")]
    train(long_enough(tiny, schedule, 8 * step, **changes), tmp_path / "run")
    assert load_run(tmp_path / "run").step == 8
    train(long_enough(tiny, schedule, 16 * step, **changes), tmp_path / "run")
    train(long_enough(tiny, schedule, 16 * step, **changes), tmp_path / "whole")
    assert load_run(tmp_path / "whole").step == 16
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert load_config(tmp_path / "run" / "config.yaml") == load_config(tmp_path / "whole" / "config.yaml")


def test_a_run_whose_decay_has_begun_goes_on_from_before_it_and_says_so(tmp_path, tiny):
    run = tmp_path / "run"
    train(long_enough(tiny, "wsd", 8), run)
    ended = weights(run)["model"]
    with pytest.warns(UserWarning, match=r"resumes from step 4, .*training.budget 8; .* kept as .*budget-8-step"):
        train(long_enough(tiny, "wsd", 16), run)
    kept = run / "checkpoints" / "budget-8-step-00000008"
    assert (kept / "state.json").exists()
    assert not all(torch.equal(ended[name], tensor) for name, tensor in weights(run)["model"].items())
    assert step_of(list_checkpoints(run)[0]) == 16


def steps_kept(run):
    return [step_of(path) for path in list_checkpoints(run)]


@pytest.mark.filterwarnings("ignore:run .* resumes from step")
def test_the_last_checkpoint_before_the_decay_is_kept_beside_the_newest(tmp_path, tiny):
    """So that a finished run can be gone on with, however few checkpoints it keeps."""
    run, settings = tmp_path / "run", {"training.keep_checkpoints": 1, "training.checkpoint_every": 1}
    train(long_enough(tiny, "wsd", 8, **settings), run)
    assert steps_kept(run) == [8, 4]
    train(long_enough(tiny, "wsd", 16, **settings), run)
    assert steps_kept(run) == [16, 8]
    train(long_enough(tiny, "wsd", 16, **settings), tmp_path / "whole")
    assert_same(run, tmp_path / "whole")
    for schedule in ("constant", "cosine"):  # the control: others have none to spare
        train(long_enough(tiny, schedule, 8, **settings), tmp_path / schedule)
        assert steps_kept(tmp_path / schedule) == [8]


@pytest.mark.parametrize(("schedule", "settings", "why", "told"), [
    ("wsd", {"training.checkpoint_every": 5, "training.keep_checkpoints": 9},
     "optim.schedule wsd has begun its decay in every checkpoint that is kept",
     r"\(to extend a run, let training.checkpoint_every save one in the first 50% of the budget\)$"),
    ("cosine", {"training.keep_checkpoints": 9}, "optim.schedule cosine follows the budget from the first step on",
     r"\(with optim.schedule wsd or constant a run can be extended\)$")])
def test_a_budget_that_has_decided_rates_is_refused_with_the_way_out(tmp_path, tiny, schedule, settings, why, told):
    run = tmp_path / "run"
    train(long_enough(tiny, schedule, 8, **settings), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"training.budget 8, now it is 16, but {why}; .*training.warm_start {told}"):
        train(long_enough(tiny, schedule, 16, **settings), run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_budget_that_has_decided_when_the_loop_begins_is_refused(tmp_path, tiny):
    run, settings = tmp_path / "run", LATE | {"training.checkpoint_every": 5}
    train(long_enough(tiny, "constant", 8, **settings), run)
    with pytest.raises(UserError, match="now it is 16, but its loop begins or changes after 25% of the budget, which "
                                        "every checkpoint that is kept has passed; choose another --run"):
        train(long_enough(tiny, "constant", 16, **settings), run)


def stopped(config, run, at):
    """Train until a step that is not saved."""
    class Stop(Callback):
        def on_step(self, trainer):
            if trainer.done.step == at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, run, callbacks=[Stop()])


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_budget_can_be_lowered_down_to_what_is_spent(tmp_path, tiny, schedule):
    run = tmp_path / "run"
    settings = {"training.eval_every": 8, "training.log_every": 2}
    stopped(long_enough(tiny, schedule, 40, **settings), run, at=8)
    assert step_of(list_checkpoints(run)[0]) == 6
    with pytest.raises(UserError, match=r"now it is 6, and 6 steps are spent already at step 6; set it higher"):
        train(long_enough(tiny, schedule, 6, **settings), run)
    train(long_enough(tiny, schedule, 12, **settings), run)
    train(long_enough(tiny, schedule, 12, **settings), tmp_path / "whole")
    assert_same(run, tmp_path / "whole")


def test_settings_that_decide_no_weight_may_change_and_the_stamp_keeps_each_change(tmp_path, tiny):
    run, averaged = tmp_path / "run", {"optim.ema_decay": 0.5}
    stopped(tiny(**averaged, **{"training.eval_every": 4}), run, at=4)
    first = (run / "stamp.json").read_text(encoding="utf-8")
    train(tiny(**averaged, **FREE), run)
    train(tiny(**averaged), tmp_path / "usual")
    ours, theirs = weights(run), weights(tmp_path / "usual")
    for file, tensors in theirs.items():
        assert all(torch.equal(ours[file][name], tensor) for name, tensor in tensors.items())
    assert load_config(run / "config.yaml") == tiny(**averaged, **FREE)
    changes = json.loads((run / "stamp.json").read_text(encoding="utf-8"))["changes"]
    assert {change["setting"] for change in changes} == set(FREE) - {"training.wandb", "training.threads"}
    assert {"when": changes[0]["when"], "step": 2, "setting": "training.log_every", "old": 3, "new": 1} in changes
    assert _first_stamp(run) == first  # what Weights & Biases knows the run by
    train(tiny(**averaged, **FREE), run)
    assert len(json.loads((run / "stamp.json").read_text(encoding="utf-8"))["changes"]) == len(changes)


@pytest.mark.parametrize("rule", FREE_OF_IMAGES)
def test_settings_of_the_answer_alone_may_change_on_images_too(tmp_path, rule):
    pytest.importorskip("sklearn")
    config, free = load_config(None, IMAGES | {"objective": rule}), FREE_OF_IMAGES[rule]
    stopped(config, tmp_path / "run", at=4)
    train(config.replace(**free), tmp_path / "run")
    train(config, tmp_path / "usual")
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "usual")
    for file, tensors in theirs.items():
        assert all(torch.equal(ours[file][name], tensor) for name, tensor in tensors.items())
    changes = json.loads((tmp_path / "run" / "stamp.json").read_text(encoding="utf-8"))["changes"]
    assert {change["setting"]: change["new"] for change in changes} == free


def test_every_free_setting_is_tried_above():
    tried = FREE | FREE_OF_IMAGES["denoise"] | FREE_OF_IMAGES["noprop-ct"]
    elsewhere = {"data.cache_dir", "training.shard"}  # shards need processes: tests/training/test_sharding.py
    assert set(FREE_AT_RESTART) - elsewhere == {
        "evaluation" if name.startswith("evaluation.") else name for name in tried}


def test_runs_of_blocks_belong_together_whatever_decides_no_weight(tmp_path, tiny):
    """As each of them may have changed it by itself."""
    blocks = {"objective": "blockwise", "blocks.num": 2, "model.num_core_layers": 2}
    config, part = tiny(**blocks), Part(tmp_path, tiny(**blocks, **FREE), tmp_path, {"data": "text"})
    check_fits(part, config, "text", "the other")
    with pytest.raises(UserError, match=r"trained with optim.lr 0.002 and the other with 0.5"):
        check_fits(part, config.replace(**{"optim.lr": 0.5}), "text", "the other")


@pytest.mark.parametrize(("change", "why"), [
    ({"optim.lr": 0.5}, r"started with optim.lr 0.002, now it is 0.5"),
    ({"seed": 3}, "started with seed 0, now it is 3"),
    ({"training.budget_unit": "tokens", "training.budget": 9}, "started with training.budget_unit 'steps'"),
    ({"optim.warmup_steps": 9, "training.log_every": 1}, "started with optim.warmup_steps 3"),
    ({"optim.decay_fraction": 0.25}, "started with optim.decay_fraction 0.2")])
def test_what_decides_weights_is_refused_whatever_else_changes(tmp_path, tiny, change, why):
    config = tiny(**{"optim.schedule": "wsd", "training.budget": 2})
    train(config, tmp_path / "run")
    with (pytest.raises(UserError, match=f"{why}.*; choose another --run"),
          open_run(config.replace(**{"training.eval_every": 7, **change}), tmp_path / "run")):
        pass
    assert load_config(tmp_path / "run" / "config.yaml") == config


def test_a_damaged_newest_checkpoint_does_not_count_as_spent(tmp_path, tiny):
    run = tmp_path / "run"
    train(long_enough(tiny, "constant", 8), run)
    (run / "latest" / "model.safetensors").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of the run is given up
        train(long_enough(tiny, "constant", 16), run)
    assert (run / "checkpoints" / "damaged-step-00000008").exists()
    train(long_enough(tiny, "constant", 16), tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole")["model"].items():
        assert torch.equal(weights(run)["model"][name], tensor)


def test_an_option_that_only_one_of_two_configs_has_is_a_difference():
    assert list(differences({"task": {"options": {"size": 6}}, "seed": 0}, {"task": {"options": {}}, "seed": 0})) == [
        Change("task.options.size", 6, None)]
    assert list(differences({"options": {}}, {"options": {"size": 6}})) == [Change("options.size", None, 6)]
    assert list(differences({"options": {"size": 6}}, {"options": None})) == [Change("options", {"size": 6}, None)]
