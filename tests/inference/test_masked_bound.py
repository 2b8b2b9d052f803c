"""The bound of masked diffusion: closed forms, enumeration, steps that approach the integral; samples and rows."""

import itertools
import json
import math

import pytest
import torch
from scipy.stats import chisquare

from looped.cli import main
from looped.config import load_config
from looped.errors import UserError
from looped.evaluation.depth_sweep import evaluate_depth
from looped.evaluation.likelihood import losses_by_depth, main_losses, masked_bounds, next_token_losses
from looped.inference.generate import generate
from looped.inference.rollout import rollout_of
from looped.inference.unmasking_rollout import bound, step_bound, step_levels
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

V = 3
SMALL = {"objective": "masked", "model.width": 8, "model.num_heads": 2, "model.num_core_layers": 2,
         "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "masked.cond_width": 4, "data.length": 16,
         "evaluation.prompt_length": 4}
BLOCKS = {"blocks.num": 2}


def make(**flags):
    config = load_config(None, SMALL | flags)
    objective = build_objective(config, build(config, V)).double().eval()
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if "modulation" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.3)
        objective.model.embed.weight.mul_(5)
    return objective


def unigram(monkeypatch, objective, probs):
    """The model that gives every token its probability, whatever it sees."""
    logits = torch.tensor(probs, dtype=torch.float64).log()
    monkeypatch.setattr("looped.objectives.masked.head_losses", lambda model, hidden, tokens: -logits[tokens])
    return objective


def draw(num, step=0):
    return StepRandom(0, step, count=num)


# ---- closed forms


@pytest.mark.parametrize("flags", [{}, BLOCKS | {"masked.schedule": "cosine"}], ids=str)
def test_a_uniform_model_has_ln_v_at_any_number_of_steps_without_variance(flags, monkeypatch):
    objective, rows = unigram(monkeypatch, make(**flags), [1 / V] * V), torch.randint(V, (4, 9))
    for steps in (1, 2, 7):
        assert step_bound(objective, rows, steps, draw(4)).tolist() == pytest.approx([math.log(V)] * 4, rel=1e-12)
    assert bound(objective, rows, 5, draw(4)).tolist() == pytest.approx([math.log(V)] * 4, rel=1e-12)


def test_the_true_unigram_distribution_has_its_entropy(monkeypatch):
    """Texts of one token each, weighted by its probability: exactly; texts that are drawn: within their error."""
    probs = [0.5, 0.2, 0.3]
    objective, entropy = unigram(monkeypatch, make(), probs), -sum(p * math.log(p) for p in probs)
    rows = torch.arange(V)[:, None].expand(-1, 9)
    for losses in (step_bound(objective, rows, 3, draw(V)), bound(objective, rows, 4, draw(V))):
        assert (torch.tensor(probs) * losses).sum().item() == pytest.approx(entropy, rel=1e-6)
    drawn = torch.multinomial(torch.tensor(probs), 200 * 9, replacement=True,
                              generator=torch.Generator().manual_seed(0)).view(200, 9)
    losses = bound(objective, drawn, 8, draw(200))
    assert abs(losses.mean().item() - entropy) < 4 * losses.std().item() / 200**0.5


# ---- enumeration


def step_bound_by_enumeration(objective, tokens, steps):
    """(m - m') / m E[sum over the hidden] / L at each level, over all sets of hidden tokens."""
    masks = torch.tensor(list(itertools.product((True, False), repeat=tokens.shape[1])))
    levels, num = step_levels(objective, steps), len(masks)
    m = levels[:-1].repeat_interleave(num)
    rows, masks = tokens.expand(num * steps, -1), masks.repeat(steps, 1)
    logits = objective.logits(rows.masked_fill(masks, V), m)
    losses = -logits.log_softmax(-1).gather(-1, rows.unsqueeze(-1)).squeeze(-1)
    chance = torch.where(masks, m[:, None], 1 - m[:, None]).prod(1)
    by_step = (chance * (losses * masks).sum(1)).view(steps, num).sum(1) / tokens.shape[1]
    return (-levels.diff() / levels[:-1] * by_step).sum().item()


@torch.no_grad()
def test_the_bound_of_n_steps_is_that_of_all_sets_of_hidden_tokens():
    objective, tokens = make(**BLOCKS), torch.tensor([[0, 2, 1, 1]])
    for steps in (1, 3):
        losses = step_bound(objective, tokens.repeat(400, 1), steps, draw(400))
        expected = step_bound_by_enumeration(objective, tokens[:, 1:], steps)
        assert abs(losses.mean().item() - expected) < 4 * losses.std().item() / 20 + 1e-9
        assert losses.std().item() < 0.5 * expected


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@torch.no_grad()
def test_steps_approach_the_integral_as_they_grow(schedule):
    """In float64, by enumeration: an error that falls as one over the number of steps; the estimate is there."""
    # What a network is told of its level has no slope at the ends; untold, its losses are smooth.
    objective = make(**{"masked.schedule": schedule, "masked.cond_width": None})
    tokens = torch.tensor([[0, 2, 1, 1]])
    by_steps = [step_bound_by_enumeration(objective, tokens[:, 1:], steps) for steps in (8, 16, 32, 64)]
    first, second, third = (abs(a - b) for a, b in itertools.pairwise(by_steps))
    assert second / first == pytest.approx(0.5, abs=0.1)
    assert third / second == pytest.approx(0.5, abs=0.1)
    limit = 2 * by_steps[-1] - by_steps[-2]  # Richardson
    estimate = bound(objective, tokens.repeat(200, 1), 32, draw(200))
    assert abs(estimate.mean().item() - limit) < 4 * estimate.std().item() / 200**0.5 + 1e-3


# ---- samples


@torch.no_grad()
def test_texts_come_as_often_as_two_steps_of_the_network_give_them():
    """Of two tokens after a prompt, each is shown in the first step with probability 1/2: all ways, enumerated."""
    objective, num = make(**BLOCKS), 1500
    prompt = torch.tensor([[1]])

    def probs(a, b, m):  # of both tokens, at the share of the text that is hidden: two of three at m = 1
        row = torch.tensor([[1, a, b]])
        return objective.logits(row, torch.tensor([m * 2 / 3], dtype=torch.float64)).softmax(-1)[0, 1:]

    both = probs(V, V, 1.0)
    expected = torch.zeros(V, V, dtype=torch.float64)
    for a, b in itertools.product(range(V), repeat=2):
        late = probs(V, V, 0.5)
        expected[a, b] = (both[0, a] * both[1, b] + both[0, a] * probs(a, V, 0.5)[1, b]
                          + both[1, b] * probs(V, b, 0.5)[0, a] + late[0, a] * late[1, b]) / 4
    drawn = generate(objective, prompt.expand(num, -1), num_tokens=2, depth=2)
    counts = torch.bincount(drawn[:, 0] * V + drawn[:, 1], minlength=V * V)
    assert expected.sum().item() == pytest.approx(1)
    assert chisquare(counts.numpy(), (num * expected).flatten().numpy()).pvalue > 0.01
    alone = both[0][:, None] * both[1]  # the positive control: one step draws them apart
    assert chisquare(counts.numpy(), (num * alone).flatten().numpy()).pvalue < 1e-4


def test_steering_acts_at_every_step():
    objective, prompt = make(), torch.tensor([[0, 1], [2, 2]])
    likeliest = [generate(objective, prompt, num_tokens=5, depth=3, **steer)
                 for steer in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9})]
    assert all(torch.equal(text, likeliest[0]) for text in likeliest)
    assert (likeliest[0] < V).all()


# ---- rows


def test_a_sweep_has_a_row_for_each_number_of_steps_and_the_limit():
    objective, rows = make(), torch.randint(V, (6, 9), generator=torch.Generator().manual_seed(0))
    sweep = evaluate_depth(objective, rows, [1, 4], bytes_per_token=2.0, batch_size=4, num_levels=8)
    means = sweep.means("nats_per_token")
    assert means == {r.depth: pytest.approx(r.losses.mean().item()) for r in losses_by_depth(objective, rows, [1, 4])}
    found = {row.metric: row.mean for row in sweep.rows if row.depth is None}
    assert found["bits_per_byte_bound"] == pytest.approx(found["nats_bound"] / math.log(2) / 2)
    assert found["nats_bound"] == pytest.approx(main_losses(objective, rows, 1, num_levels=8).mean().item())
    torch.testing.assert_close(masked_bounds(objective, rows, 8), masked_bounds(objective, rows, 8, batch_size=2))


def test_a_step_costs_the_block_that_reads_it():
    objective = make(**{"model.num_core_layers": 3, "blocks.num": 2, "blocks.layers": [1, 2]})
    # At 1, 3/4, 1/2, 1/4: the edge is the lower block's.
    assert rollout_of(objective).likelihood_cost(4).layer_forwards == 1 + 1 + 2 + 2


def test_a_masked_model_is_no_judge():
    with pytest.raises(UserError, match="can neither judge samples nor be a baseline; choose a run of --objective ar"):
        next_token_losses(make(), torch.zeros(1, 4, dtype=torch.long), 1)


def test_the_command_line_trains_measures_and_writes(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for part in range(6):
        lines = [f"def f{i}(x):\n    return x * {i} + {i * i % 17}  # {part}\n\n" for i in range(60)]
        (tmp_path / "text" / f"{part}.txt").write_text("".join(lines))
    flags = {"objective": "masked", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 2,
             "blocks.num": 2, "data.path": tmp_path / "text", "data.cache_dir": tmp_path / "tokens", "data.length": 16,
             "data.vocab_size": 300, "data.heldout": 0.2, "training.budget": 3, "training.batch_size": 2,
             "training.threads": 1, "evaluation.num_sequences": 2, "evaluation.sample_length": 4,
             "evaluation.prompt_length": 4, "evaluation.levels": 4, "evaluation.depths": "[1,2]"}
    (tmp_path / "config.yaml").write_text("objective: masked\n")
    run = str(tmp_path / "run")
    settings = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main(["train", str(tmp_path / "config.yaml"), "--run", run, *settings]) == 0
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["kind"] == "heldout"
    assert 0 < last["next_token"] < 10
    assert main(["eval", run]) == 0
    assert "in the limit of many unmasking steps: a bound of" in capsys.readouterr().out
    assert (tmp_path / "run" / "plots" / "partition.png").read_bytes().startswith(b"\x89PNG")
    assert main(["generate", run, "--depth", "3", "--num-tokens", "5", "--masked.schedule", "cosine"]) == 0
    assert main(["info", run]) == 0
    for flag in (["--probes"], ["--trajectories", "2"]):
        assert main(["eval", run, *flag]) == 2
        assert "is for rules that predict the next token" in capsys.readouterr().err
