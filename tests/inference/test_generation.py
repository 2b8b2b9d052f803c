"""Cached generation equals recomputing everything; samples depend on the seed alone; diversity is counted right."""

import pytest
import torch

from looped.config import load_config
from looped.diffusion.samplers import SAMPLERS
from looped.diffusion.sampling_params import SamplingParams
from looped.errors import UserError
from looped.evaluation.depth_sweep import evaluate_depth, evaluate_samples
from looped.evaluation.intervals import confidence_interval
from looped.evaluation.likelihood import losses_by_solver
from looped.inference.autoregressive import Writing
from looped.inference.generate import generate
from looped.inference.loop_rollout import LoopWriter
from looped.inference.padding import Padding
from looped.inference.sequence_batch import Ending
from looped.inference.text_denoising import DenoiseWriter
from looped.models.build import build
from looped.nn.cache import Cache
from looped.nn.rows import Rows
from looped.objectives import build_objective
from looped.rng import StepRandom

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

V = 40
SMALL = {"model.width": 16, "model.num_heads": 2, "denoise.target.dim": 8, "denoise.cond_width": 8,
         "model.state_init": "zero"}
RULES = [{"objective": "truncated"}, {"objective": "ar"},
         *({"objective": "denoise", "denoise.context": c} for c in ("inject", "concat", "context"))]
NAMES = ["truncated", "ar", "inject", "concat", "context"]
DAMPED = {"objective": "fixed-point", "recurrence.damping": 0.3}
MASKED = {"objective": "masked", "masked.cond_width": 8}
BLOCKS = {"denoise.block_size": 2, "data.length": 8, "evaluation.prompt_length": 4}
BLOCKWISE = {"objective": "blockwise", "blocks.num": 2}
PADDED = [*RULES, DAMPED, RULES[3] | BLOCKS, RULES[4] | BLOCKS, *(rule | BLOCKWISE for rule in RULES[2:]),
          MASKED, MASKED | {"blocks.num": 2}]
PADDED_NAMES = [*NAMES, "damped", "concat, blocks of 2", "context, blocks of 2",
                *(f"{name}, blockwise" for name in NAMES[2:]), "masked", "masked, blocks"]


def make(flags):
    config = load_config(None, SMALL | flags)
    objective = build_objective(config, build(config, V))
    if config.objective == "masked":
        objective.model.embed.weight.data.mul_(6)  # or its texts would hardly depend on what is seen
    return objective


def prompt():
    return torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("flags", [*RULES, MASKED], ids=[*NAMES, "masked"])
@pytest.mark.parametrize("depth", [1, 4])
def test_generation_is_a_function_of_the_seed(flags, depth):
    objective = make(flags)
    first, again, other = (generate(objective, prompt(), num_tokens=6, depth=depth, seed=s) for s in (0, 0, 1))
    assert first.shape == (3, 6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@torch.no_grad()
@pytest.mark.parametrize(("state_init", "runs"), [("like-init", 1), ("zero", 1), ("zero", 2)])
def test_a_cached_loop_equals_recomputing_from_the_start(state_init, runs):
    """A random initial state is that of the position, however much is read at once."""
    objective = make({"objective": "truncated", "model.state_init": state_init, "model.core_runs": runs})
    rows = prompt()

    def draws(place):
        return StepRandom(0, place, count=3)

    padding = Padding(None, 3)
    writer = LoopWriter(objective, 3, Writing(SamplingParams(), padding, draws, Ending(None)))
    writer.next_logits(rows[:, :3], draws(0))
    for i in (3, 4):
        cached = writer.next_logits(rows[:, i : i + 1], draws(i))
        drawn = padding.normal_by_place(draws, "state", 0, i + 1, objective.model.width)
        noise = drawn if objective.model.recurrence.needs_noise else None
        whole = objective.model(rows[:, : i + 1], 3, noise=noise)[:, -1:]
        torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_depth_per_sequence_goes_with_no_cache_and_a_tensor_of_one_depth_does():
    model = make({"objective": "truncated"}).model
    whole = model.unroll(model.encode(prompt()), grad=2)

    def in_pieces(depth):
        cache, pieces = Cache(), []
        for first, stop in ((0, 3), (3, 5)):
            rows = Rows(start=first, cache=cache)
            pieces.append(model.unroll(model.encode(prompt()[:, first:stop], rows), rows, grad=depth))
        return torch.cat(pieces, dim=1)

    for depth in (2, torch.tensor(2)):
        torch.testing.assert_close(in_pieces(depth), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="pass one depth for all"):
        in_pieces(torch.tensor([2, 2, 2]))


@pytest.mark.parametrize("flags", PADDED, ids=PADDED_NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_are_continued_as_one_by_one(flags, side):
    objective = make(flags | {"model.state_init": "like-init"}).double()
    lengths = torch.tensor([5, 2, 3])
    rows = [row[:n] for row, n in zip(prompt(), lengths, strict=True)]
    junk = [torch.full((5 - n,), 39) for n in lengths]
    padded = torch.stack([torch.cat([pad, row] if side == "left" else [row, pad])
                          for row, pad in zip(rows, junk, strict=True)])
    together = generate(objective, padded, num_tokens=5, depth=2, lengths=lengths, side=side)
    alone = [generate(objective, row[None], num_tokens=5, depth=2, first_row=i) for i, row in enumerate(rows)]
    assert torch.equal(together, torch.cat(alone))
    blind = generate(objective, padded, num_tokens=5, depth=2)
    assert not torch.equal(blind, together)  # positive control: padding taken for text changes it


@pytest.mark.parametrize("flags", PADDED, ids=PADDED_NAMES)
def test_the_parts_of_a_batch_write_what_the_whole_writes(flags):
    objective = make(flags).double()
    whole = generate(objective, prompt(), num_tokens=5, depth=2)
    parts = [generate(objective, prompt()[i : i + 1], num_tokens=5, depth=2, first_row=i) for i in range(3)]
    assert torch.equal(whole, torch.cat(parts))


@torch.no_grad()
@pytest.mark.parametrize(("context", "runs"), [("concat", 1), ("context", 1), ("concat", 2), ("context", 2)])
def test_a_block_is_solved_from_the_logits_of_the_whole_sequence(context, runs):
    """At the last level of a solve, the writer's cached logits are those of a pass over everything."""
    objective = make({"objective": "denoise", "denoise.context": context, "denoise.block_size": 2, "data.length": 6,
                      "evaluation.prompt_length": 2, "model.core_runs": runs}).double()
    for name, parameter in objective.named_parameters():
        if "place" in name or "modulation" in name:
            parameter.normal_(std=0.3)
    writer, seen = DenoiseWriter(objective, 1, SamplingParams(), Padding(None, 3)), []
    rows, random = prompt()[:, :5], StepRandom(0, 0, count=3)
    read = objective.denoiser.read

    def watched(z, *args, **options):
        seen.append((z, read(z, *args, **options)))
        return seen[-1][1]

    objective.denoiser.read = watched
    writer.next_logits(rows[:, :3], random)
    writer.next_logits(rows[:, 3:5], random)
    z, (cached, _) = seen[-1]
    x = torch.cat([rows, rows[:, :1]], dim=1)  # the block seeks tokens 5 and 6 from rows 4 and 5
    whole = objective.logits(x, torch.cat([torch.zeros(3, 4, 8, dtype=torch.float64), z], dim=1),
                             torch.full((3,), 20.0, dtype=torch.float64))
    torch.testing.assert_close(cached, whole[:, 4:])


@pytest.mark.parametrize("flags", RULES, ids=NAMES)
def test_the_sweep_reports_every_depth(flags):
    objective = make(flags)
    rows = torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(1))
    sweep = evaluate_depth(objective, rows, [1, 3], bytes_per_token=2.0, batch_size=2, num_trajectories=2)
    assert ("nats_by_solver" in sweep.per_example) == (flags["objective"] == "denoise")
    nats, bits = sweep.means("nats_per_token"), sweep.means("bits_per_byte")
    assert sorted(nats) == [1, 3]
    assert bits[3] == pytest.approx(nats[3] / 0.6931471805599453 / 2)
    assert all(row.ci_low <= row.mean <= row.ci_high for row in sweep.rows)
    texts, samples = evaluate_samples(objective, rows[:, :4], [1], num_tokens=5)
    assert {row.metric for row in texts} == {"distinct_1", "distinct_2", "distinct_4", "repetition_4",
                                             "text_tokens", "tokens_per_second"}
    assert samples[1].shape == (4, 5)


@pytest.mark.parametrize("solver", SAMPLERS)
@pytest.mark.parametrize("context", ["inject", "context"])
def test_every_solver_measures_and_writes(solver, context):
    objective = make({"objective": "denoise", "denoise.context": context, "denoise.solver": solver,
                      "denoise.bridge": "sampled"})
    rows = torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(1))
    results = [losses_by_solver(objective, rows, [3], seed=seed, num_trajectories=1)[0].losses for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert generate(objective, rows[:, :3], num_tokens=3, depth=3).shape == (2, 3)


def test_the_interval_holds_the_mean_and_narrows_with_more_sequences():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = confidence_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.15)


def test_bad_requests_are_named():
    objective = make(RULES[0])
    with pytest.raises(UserError, match="no tokens"):
        generate(objective, prompt()[:, :0], num_tokens=1, depth=1)
    with pytest.raises(UserError, match="negative"):
        generate(objective, prompt(), num_tokens=1, depth=1, temperature=-1)
    with pytest.raises(UserError, match="prompt lengths"):
        generate(objective, prompt(), num_tokens=1, depth=1, lengths=torch.tensor([6, 1, 1]))
    with pytest.raises(UserError, match="'middle'"):
        generate(objective, prompt(), num_tokens=1, depth=1, lengths=torch.tensor([4, 1, 1]), side="middle")
