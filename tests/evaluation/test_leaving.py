"""Early exits on text: each token of a known text leaves by itself, and what that costs is said."""

import json

import pytest
import torch

from looped.cli import main
from looped.config import load_config
from looped.errors import UserError
from looped.evaluation.early_exit import losses_with_exits, text_exit_rows
from looped.evaluation.likelihood import losses_by_depth
from looped.inference.exits import Exit
from looped.models.build import build
from looped.objectives import build_objective
from looped.objectives.base import token_losses

pytestmark = pytest.mark.usefixtures("unchecked")

VOCAB, DEPTH = 40, 6
TINY = {"model.width": 32, "model.num_heads": 2, "model.ffn_width": 48, "data.length": 32, "objective": "full",
        "model.state_init": "embedding", "recurrence.mean": 3}


def looped(**settings):
    config = load_config(None, TINY | {name.replace("__", "."): value for name, value in settings.items()})
    objective = build_objective(config, build(config, VOCAB)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in objective.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return objective


def tokens():
    return torch.randint(0, VOCAB, (5, 13), generator=torch.Generator().manual_seed(1))


def figures(objective, *exits, **settings):
    rules = [Exit.parse(text) for text in exits]
    found = losses_with_exits(objective, tokens(), DEPTH, rules, batch_size=2, **settings)
    parts = text_exit_rows(objective, found, DEPTH, rules)
    return [{row.metric: row for row in part} for part in parts]


@torch.no_grad()
def by_hand(objective):
    """ln p (num, length, vocab) after each step, one unroll."""
    model, batch = objective.model, objective.ask(tokens())
    found = []
    model.unroll(model.encode(batch.inputs), grad=DEPTH,
                 callback=lambda _, state: found.append(model.decode(state).log_softmax(-1)))
    return found, batch.targets


def test_a_token_leaves_at_the_first_step_at_which_it_has_settled():
    """By the divergence of each readout from the one before, worked out here; the loss is that of the step it left."""
    objective = looped()
    (found,) = figures(objective, "kl=0.5")
    steps, targets = by_hand(objective)
    used = torch.full(targets.shape, DEPTH)
    for step in range(DEPTH - 1, 0, -1):
        change = (steps[step].exp() * (steps[step] - steps[step - 1])).sum(-1)
        used = torch.where(change < 0.5, step + 1, used)
    losses = torch.stack([token_losses(each, targets) for each in steps])
    left = losses.gather(0, used.unsqueeze(0) - 1)[0]
    assert 1 < used.double().mean() < DEPTH
    assert found["steps_used"].mean == pytest.approx(used.double().mean().item())
    assert found["nats_with_exit"].mean == pytest.approx(left.mean().item(), rel=1e-5)
    assert found["lost_by_exit"].mean == pytest.approx((left - losses[-1]).mean().item(), abs=1e-5)
    c = objective.model.config
    each = c.num_prelude_layers + used.double() * (c.num_core_layers + c.num_coda_layers)
    assert found["steps_used"].layer_forwards == pytest.approx(each.mean().item())


def test_a_function_is_an_exit():
    def changes_little(moment):
        if moment.before is None:
            return torch.zeros_like(moment.same, dtype=torch.bool)
        now, then = moment.logits.log_softmax(-1), moment.before[0].log_softmax(-1)
        return moment.batch.mean((now.exp() * (now - then)).sum(-1)) < 0.5

    _, named, called = losses_with_exits(looped(), tokens(), DEPTH, ["kl=0.5", changes_little])
    assert 1 < named.used.double().mean() < DEPTH
    assert torch.equal(named.used, called.used)
    assert Exit.of(changes_little).name == "changes_little"
    with pytest.raises(UserError, match=r"exit <lambda> must return a bool tensor of .* rows"):
        losses_with_exits(looped(), tokens(), DEPTH, [lambda moment: moment.logits])


def test_an_exit_that_nobody_takes_gives_the_loss_of_all_steps():
    objective = looped()
    (found,) = figures(objective, "kl=0")
    (full,) = losses_by_depth(objective, tokens(), [DEPTH])
    assert found["steps_used"].mean == DEPTH
    assert found["nats_with_exit"].mean == pytest.approx(full.losses.mean().item(), rel=1e-6)
    assert found["lost_by_exit"].mean == 0


def test_looser_thresholds_leave_earlier_and_several_exits_are_as_each_alone():
    objective = looped()
    together = figures(objective, "latent=0.01", "latent=0.5", "confidence=0.2", "entropy=0.1")
    for text, found in zip(["latent=0.01", "latent=0.5", "confidence=0.2", "entropy=0.1"], together, strict=True):
        assert figures(objective, text)[0] == found
    assert together[1]["steps_used"].mean < together[0]["steps_used"].mean


def test_the_gate_of_the_model_lets_each_token_go():
    objective = looped(model__exit_gate=True, recurrence__loss_on="gate")
    early, late, never = figures(objective, "gate=0.3", "gate=0.9", "gate=1")
    assert early["steps_used"].mean < late["steps_used"].mean <= never["steps_used"].mean == DEPTH
    with pytest.raises(UserError, match="needs the exit gate of a loop, and this run has none"):
        figures(looped(), "gate")


def test_a_denoiser_has_no_steps_that_a_token_leaves_after():
    config = load_config(None, TINY | {"objective": "denoise"})
    with pytest.raises(UserError, match="no steps after which a token could exit; choose full"):
        figures(build_objective(config, build(config, VOCAB)), "kl")


def test_looped_eval_tells_of_exits_on_text(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 400)
    settings = TINY | {"data.path": str(tmp_path / "text.txt"), "data.vocab_size": 270, "training.budget": 2,
                       "training.batch_size": 2, "training.num_evals": 0, "evaluation.num_sequences": 3}
    from looped.training.train import train

    train(load_config(None, settings), tmp_path / "run")
    assert main(["eval", str(tmp_path / "run"), "--depths", "1,4", "--exits", "kl=0.01,latent"]) == 0
    said = capsys.readouterr().out
    assert "steps/token" in said
    rows = [json.loads(line) for line in (tmp_path / "run/eval/depth.jsonl").read_text().splitlines()]
    (tmp_path / "run/eval/depth.jsonl").unlink()
    for exit in ("gate", "head"):
        assert main(["eval", str(tmp_path / "run"), "--exits", exit]) == 2
        assert f"exit {exit} needs" in capsys.readouterr().err
    assert not (tmp_path / "run/eval/depth.jsonl").exists()  # refused before anything is measured
    assert {row["by"] for row in rows if row["metric"] == "steps_used"} == {"kl=0.01", "latent=0.03"}
