"""Losses of single tokens by depth: one unroll, each that of log-softmax by hand; eval/tokens.parquet holds them."""

import json
import sys

import pytest
import torch

import looped
from looped import UserError, load_run
from looped.cli import main
from looped.config import load_config
from looped.evaluation.likelihood import losses_by_depth, next_token_losses, token_losses_by_depth
from looped.models.build import build
from looped.objectives import build_objective
from looped.training.train import train

pandas = pytest.importorskip("pandas")
pytestmark = pytest.mark.usefixtures("unchecked")

VOCAB = 40
SMALL = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "recurrence.mean": 2,
         "recurrence.backprop": 1, "denoise.cond_width": 8, "denoise.target.dim": 4, "data.length": 16,
         "evaluation.prompt_length": 4}


def objective_of(rule, **settings):
    config = load_config(None, SMALL | {"objective": rule} | settings)
    return build_objective(config, build(config, VOCAB), end_of_text=0).eval()


def tokens(num=5, length=9):
    return torch.randint(VOCAB, (num, length), generator=torch.Generator().manual_seed(1))


def test_a_loop_is_unrolled_once_to_the_deepest_depth():
    """Counted by a hook on the core; as many calls, one a depth, would be the sum of the depths."""
    objective, calls = objective_of("full"), []
    hook = objective.model.recurrence.core.register_forward_hook(lambda *_: calls.append(1))
    found = token_losses_by_depth(objective, tokens(), [5, 1, 3])
    hook.remove()
    assert found.shape == (3, 5, 8)
    assert len(calls) == 5


@torch.no_grad()
def test_the_loss_of_a_token_is_that_of_log_softmax_by_hand():
    objective = objective_of("full", **{"model.state_init": "embedding"})
    found = token_losses_by_depth(objective, tokens(), [1, 4], batch_size=2)
    model, rows = objective.model, tokens()
    for place, depth in enumerate((1, 4)):
        state = e = model.encode(rows[:, :-1])
        state = model.initial_state(e, None)
        for _ in range(depth):
            state = model.step(state, e)
        logits = model.decode(state)[3, 6]
        by_hand = torch.log(torch.exp(logits).sum()) - logits[rows[3, 7]]
        assert found[place, 3, 6].item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("rule", ["full", "ar", "denoise"])
def test_the_mean_over_tokens_is_the_loss_of_the_sequence_in_any_batches(rule):
    """The same draws as `losses_by_depth`, whatever the batch size."""
    objective = objective_of(rule)
    for size in (2, 16):
        found = token_losses_by_depth(objective, tokens(), [2, 1], seed=3, batch_size=size)
        for each, result in zip(found, losses_by_depth(objective, tokens(), [1, 2], seed=3), strict=True):
            torch.testing.assert_close(each.double().mean(1), result.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], next_token_losses(objective, tokens(), 2, seed=3), rtol=1e-4, atol=1e-4)


def test_tokens_that_are_not_sought_have_no_loss():
    objective = objective_of("denoise", **{"denoise.block_size": 3, "data.documents": "separate", "data.length": 18})
    rows = tokens(length=19).clamp(min=1)
    rows[:, 7] = 0
    sought = objective.ask(rows).sought
    found = token_losses_by_depth(objective, rows, [1])
    assert 0 < (~sought).sum() < sought.numel()
    assert torch.equal(found[0].isnan(), ~sought)


def test_masked_diffusion_has_no_losses_of_single_tokens():
    with pytest.raises(UserError, match="no loss per token, so it has no token losses by depth; choose"):
        token_losses_by_depth(objective_of("masked", **{"masked.cond_width": 8}), tokens(), [1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens")
    for part in range(5):
        (path / f"{part}.txt").write_text(f"{part} " + "def f(x):\n    return x + 1\n" * 40)
    train(load_config(None, SMALL | {
        "objective": "truncated", "data.path": str(path / "*.txt"), "data.cache_dir": str(path / "cache"),
        "data.vocab_size": 270, "data.heldout": 0.4, "training.budget": 1, "training.batch_size": 2,
        "training.threads": 1, "training.num_evals": 0, "evaluation.num_sequences": 4, "evaluation.num_samples": 6,
        "evaluation.sample_length": 4}), path / "run")
    assert main(["eval", str(path / "run"), "--depths", "1,3", "--per-token", "--exits", "kl=0.01,latent=0.5"]) == 0
    return path / "run"


def rows_of(run, metric):
    return [row for row in map(json.loads, (run / "eval/depth.jsonl").read_text().splitlines())
            if row["metric"] == metric]


def test_each_token_of_the_file_is_that_of_the_held_out_stream_and_of_its_document(run):
    found, opened = looped.read_results(run, "tokens"), load_run(run)
    assert len(found) == 4 * 16 * (2 + 2)
    stream = opened.data.heldout.tokens
    assert (found["token"] == [stream[place] for place in found["start"] + found["position"]]).all()
    inside = 0
    for one in found[(found["position"] == 5) & (found["depth"] == 1)].itertuples():
        ids = opened.tokenizer.encode((run.parent / one.document).read_text())
        if one.offset + 5 < len(ids):  # not yet in the next document
            assert ids[one.offset + 5] == one.token
            inside += 1
    assert inside > 1


def test_the_means_of_the_file_are_the_figures_also_where_tokens_left(run):
    found = looped.read_results(run, "tokens")
    means = found.groupby(["by", "depth"])[["nats", "steps"]].mean()
    for row in rows_of(run, "nats_per_token"):
        assert means.loc[("", row["depth"]), "nats"] == pytest.approx(row["mean"], rel=1e-5)
    for metric, column in (("nats_with_exit", "nats"), ("steps_used", "steps")):
        for row in rows_of(run, metric):
            assert means.loc[(row["by"], 3), column] == pytest.approx(row["mean"], rel=1e-5)
    assert found[found["by"] == ""]["steps"].isna().all()


def test_another_evaluation_adds_its_depths_and_replaces_its_own(run, tmp_path):
    sizes = []
    for depths in ("1", "1,2", "2"):
        assert main(["eval", str(run), "--depths", depths, "--per-token", "--out", str(tmp_path)]) == 0
        sizes.append(len(looped.read_results(tmp_path, "tokens")))
    assert sizes == [64, 128, 128]
    found = looped.read_results([run, tmp_path], "tokens")
    assert set(found["run"]) == {str(run)}
    assert set(found["depth"]) == {1, 2, 3}
    assert found["start"].notna().all()


def test_other_data_and_other_rules_refuse_in_one_sentence(run, tmp_path, capsys, monkeypatch):
    tiny = {"model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1, "training.budget": 1,
            "training.batch_size": 2, "training.threads": 1, "training.num_evals": 0}
    train(load_config(None, tiny | {"task.name": "prefix-sums", "objective": "truncated"}), tmp_path / "sums")
    text = {name: value for name, value in load_run(run).config.model_dump(mode="json").items() if name == "data"}
    train(load_config(None, tiny | {"objective": "masked", "masked.cond_width": 8, "data": text["data"],
                                    "evaluation.levels": 2, "evaluation.prompt_length": 4}), tmp_path / "masked")
    capsys.readouterr()
    for name, why in (("sums", "--per-token is for text, and"), ("masked", "--per-token is for rules that predict")):
        assert main(["eval", str(tmp_path / name), "--per-token"]) == 2
        said = capsys.readouterr().err
        assert why in said
        assert said.count("\n") == 1
    assert main(["eval", str(run), "--per-token", "--tasks", "x"]) == 2
    assert "--per-token evaluates held-out text" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert main(["eval", str(run), "--per-token"]) == 2
    assert "pip install pandas" in capsys.readouterr().err


def test_a_run_without_the_file_says_how_it_is_made(tmp_path):
    (tmp_path / "run/eval").mkdir(parents=True)
    with pytest.raises(UserError, match=r"looped eval .*run --per-token"):
        looped.read_results(tmp_path / "run", "tokens")
    (tmp_path / "run/eval/tokens.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"tokens.parquet is damaged .*; rebuild it with looped eval --per-token"):
        looped.read_results(tmp_path / "run", "tokens")
