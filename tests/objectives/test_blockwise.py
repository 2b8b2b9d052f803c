"""One block a step: who is at work, that nothing passes between blocks, and that solvers ask the owner of a level."""

import pytest
import torch

from looped.config import load_config
from looped.data.batch import Batch
from looped.data.task_data import prepare_task
from looped.diffusion import denoiser as denoiser_module
from looped.diffusion.denoiser import levels_of
from looped.diffusion.noise import interval
from looped.diffusion.sampling_params import SamplingParams
from looped.diffusion.schedules import schedule
from looped.errors import UserError
from looped.evaluation.likelihood import losses_by_depth, losses_by_sigma, losses_by_solver
from looped.inference.generate import generate
from looped.inference.padding import Padding
from looped.inference.rollout import answer, rollout_of
from looped.inference.text_denoising import DenoiseWriter
from looped.models.build import build
from looped.nn.cache import Cache
from looped.nn.rows import Rows
from looped.objectives import build_objective
from looped.rng import StepRandom

V, L, N = 30, 8, 3
SMALL = {"objective": "blockwise", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 4,
         "blocks.num": N, "blocks.layers": [1, 2, 1], "denoise.target.dim": 4, "denoise.cond_width": 8,
         "data.length": L, "evaluation.prompt_length": 4}
CONTEXTS = ["inject", "concat", "context"]


def make(**flags):
    config = load_config(None, SMALL | flags)
    objective = build_objective(config, build(config, V))
    with torch.no_grad():  # a modulation that starts at zero would hide the level
        for name, parameter in objective.named_parameters():
            if "modulation" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    return objective


def tokens(rows=4):
    return torch.randint(V, (rows, L + 1), generator=torch.Generator().manual_seed(0))


def blocks_of(objective):
    return objective.model.recurrence.core.blocks


def disturb(block):
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1.0)


def steps_of(objective, block, num=1):
    """Numbers of steps in which this block is at work."""
    return [step for step in range(60) if objective.sample_block(StepRandom(0, step, count=1)) == block][:num]


def sequences_at(objective, levels):
    """(x, z, sigma) with a level for each sequence."""
    x, sigma = tokens(len(levels))[:, :-1], torch.tensor(levels, dtype=torch.float64)
    return x, 1.5 * torch.randn(len(levels), L, 4, generator=torch.Generator().manual_seed(1)), sigma


# ---- training


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("shared", ["trained", "frozen"])
def test_the_active_block_alone_gets_a_gradient(shared, context):
    objective = make(**{"blocks.shared": shared, "denoise.context": context})
    for block in range(N):
        (step,) = steps_of(objective, block)
        objective(tokens(), StepRandom(0, step, count=4)).value.backward()
        for number, other in enumerate(blocks_of(objective)):
            assert all((p.grad is not None) == (number == block) for p in other.parameters())
        assert all((p.grad is not None) == (shared == "trained") for p in objective.shared_parameters())
        objective.zero_grad()


def losses_with_another_block_disturbed(objective, block):
    """The loss of a block before and after the weights of the next one are changed."""
    (step,), random = steps_of(objective, block), StepRandom
    before = objective(tokens(), random(0, step, count=4)).value
    disturb(blocks_of(objective)[(block + 1) % N])
    return before, objective(tokens(), random(0, step, count=4)).value


@pytest.mark.parametrize("block", range(N))
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_blocks_loss_does_not_move_with_another_blocks_weights(context, block):
    before, after = losses_with_another_block_disturbed(make(**{"denoise.context": context}), block)
    assert torch.equal(before, after)


def test_a_planted_leak_between_blocks_is_seen(monkeypatch):
    objective = make()
    core = objective.model.recurrence.core
    step = type(core).forward
    monkeypatch.setattr(type(core), "forward", lambda self, state, e, *told, block=0: step(
        self, step(self, state, e, *told, block=(block + 1) % N), e, *told, block=block))
    before, after = losses_with_another_block_disturbed(objective, 1)
    assert not torch.equal(before, after)


def test_a_block_trains_on_its_interval_and_the_first_alone_at_sigma_max():
    objective = make(**{"blocks.overlap": 0.3})
    noise, edges = objective.noise, objective.denoiser.edges
    for block in range(N):
        sigma = objective.levels_of(block, StepRandom(0, 0, count=400))
        low, high = interval(block, edges, 0.3)
        assert low <= sigma.min() < sigma.max() <= high
        assert bool((sigma == noise.sigma_max).any()) == (block == 0)
        others = (objective.denoiser.owners(sigma) != block).double().mean().item()
        assert 0 < others < 0.5  # the overlap
        assert objective.denoiser.owners(torch.tensor([(low * high) ** 0.5])).item() == block


def test_blocks_are_drawn_as_often_as_the_config_says_and_by_all_processes_alike():
    for choose, shares in (("uniform", [1 / 3] * 3), ("mass", [0.75 + 0.25 / 3, 0.25 / 3, 0.25 / 3])):
        objective = make(**{"blocks.choose": choose})
        draws = torch.tensor([objective.sample_block(StepRandom(0, step, count=2)) for step in range(1500)])
        assert (torch.bincount(draws) / 1500).tolist() == pytest.approx(shares, abs=0.04)
        again = [objective.sample_block(StepRandom(0, step, start=6, count=2)) for step in range(20)]
        assert again == draws[:20].tolist()


def test_in_evaluation_all_blocks_count_as_often_as_they_are_drawn():
    objective, random = make(**{"blocks.choose": "mass"}).eval(), StepRandom(0, 0, count=4)
    loss = objective(tokens(), random)
    own = [loss.metrics[f"ce_block{block}"].item() for block in range(N)]
    assert len(set(own)) == N
    assert loss.value.item() == pytest.approx(sum(s * ce for s, ce in zip(objective.shares.tolist(), own, strict=True)))


def test_a_step_costs_one_block():
    assert make().layer_forwards() == pytest.approx(3 * (1 + 4 / 3 + 1))
    assert make(**{"blocks.shared": "frozen"}).layer_forwards() == pytest.approx(1 + 4 + 2)
    shares = [0.75 + 0.25 / 3, 0.25 / 3, 0.25 / 3]
    assert make(**{"blocks.choose": "mass"}).layer_forwards() == pytest.approx(3 * (2 + shares[0] + 2 * shares[1]
                                                                                    + shares[2]))
    assert [rollout_of(make()).likelihood_cost(depth).layer_forwards for depth in (1, 3)] == [1 + 1 + 1, 1 + 4 + 3]


def test_the_first_weights_of_a_block_do_not_depend_on_the_others():
    few, many = make(), make(**{"blocks.num": 4, "blocks.layers": [1, 2, 1, 3], "model.num_core_layers": 7})
    for block, same in zip(blocks_of(few), blocks_of(many), strict=False):
        for (name, weight), other in zip(block.named_parameters(), same.parameters(), strict=True):
            assert torch.equal(weight, other), name


# ---- reading: one function says whose a level is


@torch.no_grad()
@pytest.mark.parametrize("context", CONTEXTS)
def test_each_sequence_is_read_by_the_owner_of_its_level(context):
    objective = make(**{"denoise.context": context}).eval()
    x, z, sigma = sequences_at(objective, [20.0, 0.6, 3.0, 19.0, 0.5])
    together = objective.logits(x, z, sigma)
    for row in range(len(x)):
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], objective.logits(x[one], z[one], sigma[one]))
    for number, rows in enumerate(([0, 3], [2], [1, 4])):
        disturb(blocks_of(objective)[number])
        moved = (objective.logits(x, z, sigma) - together).abs().amax((1, 2)) > 1e-6
        assert moved.nonzero().squeeze(1).tolist() == rows
        together = objective.logits(x, z, sigma)


def readers(objective, monkeypatch, work):
    """The block of every reading of the network during `work()`."""
    seen, step = [], objective.model.step

    def watched(state, e, level, rows):
        seen.append(rows.block)
        return step(state, e, level, rows)

    with monkeypatch.context() as patch:
        patch.setattr(objective.model, "step", watched)
        work()
    return seen


def check_one_truth(objective, monkeypatch, block):
    """Training, a single reading, likelihood and samples ask the same block: about a level in the middle of those it
    trains on, and in a schedule of three levels about one in its interval."""
    low, high = interval(block, objective.denoiser.edges)
    z, x = torch.zeros(2, L, 4), tokens(2)[:, :-1]
    asked = [
        lambda: objective.loss_of(block, Batch.of(tokens()), StepRandom(0, 0, count=4)),
        lambda: objective.denoiser(z, levels_of(z, (low * high) ** 0.5), objective.model.encode(x)),
        lambda: losses_by_depth(objective, tokens(2), [3]),
        lambda: generate(objective, tokens(2)[:, :4], num_tokens=1, depth=3)]
    train, read, by_depth, written = (readers(objective, monkeypatch, work) for work in asked)
    assert train == read == [block]
    assert by_depth == written == list(range(N))


@pytest.mark.parametrize("block", range(N))
def test_training_likelihood_and_samples_agree_whose_a_level_is(block, monkeypatch):
    check_one_truth(make(**{"denoise.context": "inject"}), monkeypatch, block)


def test_an_inverted_order_of_blocks_is_seen(monkeypatch):
    """The control: it once ran inverted between training and evaluation, and nobody saw it."""
    upright = denoiser_module.block_of
    monkeypatch.setattr(denoiser_module, "block_of", lambda sigma, edges: N - 1 - upright(sigma, edges))
    with pytest.raises(AssertionError):
        check_one_truth(make(**{"denoise.context": "inject"}), monkeypatch, 0)


@torch.no_grad()
def test_levels_of_several_blocks_with_a_cache_or_in_one_sequence_are_refused():
    objective = make(**{"denoise.context": "inject"}).eval()
    x, z, sigma = sequences_at(objective, [20.0, 0.6])
    e = objective.model.encode(x)
    with pytest.raises(UserError, match="a cache holds the rows of one"):
        objective.denoiser(z, sigma, e, Rows(cache=Cache()))
    with pytest.raises(UserError, match="a sequence runs through one"):
        objective.denoiser(z, sigma.unsqueeze(1).expand(2, L), e)


@torch.no_grad()
@pytest.mark.parametrize("context", CONTEXTS)
def test_everything_that_reads_a_denoiser_reads_several_blocks(context):
    objective = make(**{"denoise.context": context}).eval()
    assert all(result.losses.isfinite().all() for result in losses_by_depth(objective, tokens(), [1, 2, 5]))
    assert all(losses.isfinite().all() for _, losses in losses_by_sigma(objective, tokens(), num_levels=5))
    solved = losses_by_solver(objective, tokens(), [4], num_trajectories=2)
    assert all(result.losses.isfinite().all() for result in solved)
    assert generate(objective, tokens()[:, :4], num_tokens=3, depth=4).shape == (4, 3)


@torch.no_grad()
@pytest.mark.parametrize("context", ["concat", "context"])
def test_a_token_is_solved_from_the_logits_of_the_whole_sequence_at_every_level(context):
    """The writer keeps clean keys and values of every block, and adds to them token by token."""
    objective, seen = make(**{"denoise.context": context}).eval().double(), []
    writer, rows = DenoiseWriter(objective, N, SamplingParams(), Padding(None, 3)), tokens()[:, :5]
    read = objective.denoiser.read

    def watched(z, sigma, e, rows, **options):
        found = read(z, sigma, e, rows, **options)
        if rows.block is not None:
            seen.append((z, sigma, rows.block, found[0]))
        return found

    objective.denoiser.read = watched
    for new in (rows[:, :3], rows[:, 3:4], rows[:, 4:]):
        writer.next_logits(new, StepRandom(0, 0, count=4))
    objective.denoiser.read = read
    assert [block for _, _, block, _ in seen] == [*range(N)] * 3
    for z, sigma, _, logits in seen[-N:]:
        whole = torch.cat([torch.zeros(4, 4, 4, dtype=torch.float64), z.double()], dim=1)
        torch.testing.assert_close(logits, objective.logits(rows, whole, sigma)[:, -1:])


@torch.no_grad()
def test_a_context_holds_each_blocks_keys_apart():
    for kind in ("context", "concat"):
        model = make(**{"denoise.context": kind}).eval().model
        e = model.encode(tokens()[:, :-1])
        whole = model.make_context(e, kind)
        for block in range(N):
            alone = model.make_context(e, kind, Rows(block=block))
            for part, num in (("core", model.core_layers[block]), ("coda", 1)):
                for layer in range(num):
                    ours, theirs = (c.of_block(block).child(part).layer(layer).k for c in (whole, alone))
                    assert torch.equal(ours, theirs)
            assert alone.of_block((block + 1) % N).num_bytes() == 0


@torch.no_grad()
def test_answers_of_a_task_are_read_by_the_owners(monkeypatch):
    objective = make(**{"task.name": "prefix-sums", "task.difficulty": [6, 6], "denoise.context": "inject"}).eval()
    config = load_config(None, SMALL | {"task.name": "prefix-sums", "task.difficulty": [6, 6],
                                        "denoise.context": "inject"})
    batch = prepare_task(config.task).train.batch(0, batch_size=2, seed=0)
    seen = readers(objective, monkeypatch, lambda: answer(objective, batch, [6], config))
    levels = schedule(config.denoise.schedule, 6, objective.noise)[:-1]
    assert seen == objective.denoiser.owners(levels).tolist() == [0, 0, 1, 1, 2, 2]


# ---- settings


@pytest.mark.parametrize(("flags", "why"), [
    ({"blocks.num": 1, "blocks.layers": None}, "set objective to denoise, or blocks.num to 2"),
    ({"objective": "denoise"}, "set objective to blockwise, or blocks.num to 1"),
    ({"blocks.edges": [3.0]}, "blocks.num to 2, or give 2 edges"),
    ({"blocks.edges": [1.0, 3.0]}, "give \\[3.0, 1.0\\]"),
    ({"blocks.edges": [30.0, 3.0]}, "do not lie between .* move them inside"),
    ({"denoise.train_steps": 2}, "denoise.train_steps 2 .* set it to 1"),
    ({"denoise.block_size": 2, "denoise.order": "left-to-right"}, "denoise.order left-to-right .* set it to together"),
    ({"denoise.noise.distribution": "adaptive"}, "set it to log-uniform or log-normal"),
    ({"blocks.choose": "mass", "denoise.noise.share_at_max": 1.0}, "set blocks.choose to uniform"),
    ({"blocks.overlap": -0.1}, "overlap"),
])
def test_what_does_not_fit_is_named_in_one_sentence(flags, why):
    with pytest.raises(UserError, match=why) as error:
        load_config(None, SMALL | flags)
    assert "\n" not in str(error.value)
