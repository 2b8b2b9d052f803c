"""Answers at any depth: read along one unroll, solved the same in any batch, left early by exits that know padding."""

import itertools

import pytest
import torch

from looped.config import load_config
from looped.data.batch import Batch, collate
from looped.data.task import find_task
from looped.errors import UserError
from looped.inference.denoiser_rollout import Solver
from looped.inference.exits import EXITS, EarlyExit, Exit
from looped.inference.loop_rollout import LoopRollout
from looped.inference.motion import moved
from looped.inference.rollout import answer
from looped.inference.trajectories import Copies, own_normal
from looped.models.build import build
from looped.nn.exit_gate import ExitGate
from looped.objectives import build_objective
from looped.objectives.base import rows_of_batch
from looped.rng import StepRandom

TINY = {"task.name": "prefix-sums", "model.width": 16, "model.num_heads": 2, "model.num_core_layers": 1,
        "denoise.cond_width": 8, "denoise.target.dim": 4, "denoise.context": "inject", "recurrence.mean": 3}


def made(objective="denoise", **settings):
    config = load_config(None, TINY | {"objective": objective} | settings)
    model = build_objective(config, build(config, 4)).eval()
    with torch.no_grad():  # far from the start, where a readout says nothing
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, config


def problems(*bits):
    task = find_task("prefix-sums")
    return collate(task, [task.problem(0, index, number) for index, number in enumerate(bits)], causal=False)


def alone(batch: Batch, row: int) -> Batch:
    """A row of a batch, without what filled it up."""
    length = int(batch.lengths[row]) if batch.lengths is not None else batch.inputs.shape[1]
    cut = {name: value[row : row + 1, :length] for name, value in vars(batch).items()
           if isinstance(value, torch.Tensor) and value.ndim > 1}
    return Batch(**cut, causal=batch.causal)


LEARNED = ("head", "gate")


@pytest.mark.parametrize(("objective", "exit"), [
    *itertools.product(["full", "denoise"], [None, *(kind for kind in EXITS if kind not in LEARNED)]),
    ("full", "gate")])
def test_a_problem_is_solved_the_same_alone_and_in_a_batch_of_other_lengths(objective, exit):
    model, config = made(objective, **{"model.exit_gate": exit == "gate"})
    batch = problems(6, 3, 5)
    loose = {"kl": "kl=0.05", "entropy": "entropy=0.05", "latent": "latent=0.4", "confidence": "confidence=0.5",
             "gate": "gate=0.7"}
    rule = exit and Exit.parse(loose.get(exit, exit))
    together = answer(model, batch, [2, 9], config, exit=rule)
    for row, length in enumerate(batch.lengths.tolist()):
        single = answer(model, alone(batch, row), [2, 9], config, first=row, exit=rule)
        for depth in (2, 9):
            assert torch.equal(together[depth].answers[row, :length], single[depth].answers[0])
            assert together[depth].used[row] == single[depth].used[0]
    if rule is not None:
        assert together[9].used.max() <= 9


def test_a_state_of_several_streams_is_read_and_its_residual_is_that_of_all_streams():
    model, config = made("full", **{"model.streams": 3, "model.state_init": "zero"})
    batch = problems(6, 3, 5)
    assert answer(model, batch, [4], config)[4].answers.shape == batch.inputs.shape
    before, after = torch.randn(2, 3, 8, 3, 16, generator=torch.Generator().manual_seed(0)).unbind()
    cells = torch.ones(3, 8, 1)
    change, norm = moved(before, after, cells)
    assert torch.allclose(change, (after - before).flatten(1).norm(dim=1))
    assert torch.allclose(norm, after.flatten(1).norm(dim=1))


@pytest.mark.parametrize("objective", ["full", "denoise"])
def test_an_exit_that_is_never_taken_changes_nothing(objective):
    model, config = made(objective)
    batch = problems(6, 3, 5)
    plain = answer(model, batch, [7], config)[7]
    never = answer(model, batch, [7], config, exit=Exit.parse("answer=100"))[7]
    assert torch.equal(plain.answers, never.answers)
    assert plain.used.tolist() == never.used.tolist() == [7, 7, 7]


def test_an_exit_taken_at_once_costs_the_fewest_steps_there_are():
    model, config = made("full")
    assert answer(model, problems(4, 4), [9], config, exit=Exit.parse("answer=1"))[9].used.tolist() == [1, 1]
    assert answer(model, problems(4, 4), [9], config, exit=Exit.parse("kl=1e9"))[9].used.tolist() == [2, 2]


def test_a_loop_is_read_at_each_depth_as_if_it_were_the_last():
    model, config = made("full")
    batch = problems(5, 5)
    at_once = answer(model, batch, [1, 2, 4], config)
    for depth in (1, 2, 4):
        assert torch.equal(at_once[depth].answers, answer(model, batch, [depth], config)[depth].answers)


def test_rows_that_have_left_cost_nothing():
    model, config = made("full")
    sizes, step = [], model.model.step
    model.model.step = lambda state, *rest, **options: sizes.append(len(state)) or step(state, *rest, **options)
    batch = problems(*[4] * 8)
    used = answer(model, batch, [40], config, exit=Exit.parse("answer=4"))[40].used
    assert sum(sizes) == used.sum()
    assert sizes[0] == 8
    assert len(set(used.tolist())) > 1  # or the test shows nothing


def test_damping_keeps_a_share_of_the_old_state():
    model, _ = made("full", **{"recurrence.damping": 0.25, "model.state_init": "zero"})
    batch = problems(4, 4)
    rows = rows_of_batch(batch)
    with torch.no_grad():
        e = model.model.encode(batch.inputs, rows)
        first, second = LoopRollout(model).states(Copies(batch, StepRandom(0, 0, count=2)), 2, EarlyExit(batch))
        torch.testing.assert_close(first, 0.75 * model.model.step(torch.zeros_like(e), e, None, rows))
        torch.testing.assert_close(second, 0.25 * first + 0.75 * model.model.step(first, e, None, rows))


def test_noise_does_not_depend_on_how_far_a_batch_is_filled_up():
    batch = problems(6, 3)
    drawn = own_normal(StepRandom(0, 0, count=2), "state", batch, 5)
    single = own_normal(StepRandom(0, 0, start=1, count=1), "state", alone(batch, 1), 5)
    assert torch.equal(drawn[1, :4], single[0])
    assert drawn[1, 4:].abs().sum() == 0


def test_given_cells_have_no_noisy_copy_of_themselves():
    """What is given at a cell that is not sought reaches the network once; its z is nothing, at every level."""
    config = load_config(None, TINY | {"task.name": "sudoku"})
    model = build_objective(config, build(config, 5)).eval()
    task = find_task("sudoku")
    batch = collate(task, [task.problem(0, 0, 10)], causal=False)
    seen, state = [], model.denoiser._state
    model.denoiser._state = lambda z, *rest, **options: seen.append(z) or state(z, *rest, **options)
    answer(model, batch, [3], config)
    model(batch, StepRandom(0, 0, count=1))
    assert len(seen) == 4
    for z in seen:
        assert z[~batch.scored].abs().sum() == 0
        assert (z[batch.scored].abs().sum(-1) > 0).all()


def test_several_trajectories_are_averaged_or_the_surest_is_kept():
    model, config = made(**{"evaluation.trajectories": 3})
    batch = problems(5, 4)
    solver, streams = Solver(model, batch), ("", "trajectory1 ", "trajectory2 ")
    with torch.no_grad():
        runs = [solver.run(4, StepRandom(0, 0, count=2), stream=stream) for stream in streams]
        mean = torch.stack([run.logits.softmax(-1) for run in runs]).mean(0).argmax(-1)
        answers = torch.stack([run.logits.argmax(-1) for run in runs])
        sure = torch.stack([solver.consistency(each, StepRandom(0, 0, count=2), stream)
                            for each, stream in zip(answers, streams, strict=True)])
    found = answer(model, batch, [4], config)[4]
    assert torch.equal(found.answers, mean)
    assert found.used.tolist() == [12, 12]
    surest = answer(model, batch, [4], config.replace(**{"evaluation.choose": "consistent"}))[4]
    for row in range(2):
        assert torch.equal(surest.answers[row], answers[sure[:, row].argmax(), row])


def test_a_start_at_zero_takes_no_noise_from_the_start():
    model, config = made(**{"denoise.start": "zero", "denoise.solver": "euler", "denoise.bridge": "soft"})
    batch = problems(5, 4)
    one, other = (answer(model, batch, [4], config.replace(seed=seed))[4].answers for seed in (0, 1))
    assert torch.equal(one, other)
    noisy, config = made(**{"denoise.solver": "euler", "denoise.bridge": "soft", "denoise.noise.sigma_max": 50.0})
    assert any(not torch.equal(Solver(noisy, batch).run(1, StepRandom(0, 0, count=2)).logits,
                               Solver(noisy, batch).run(1, StepRandom(seed, 0, count=2)).logits) for seed in (1, 2))


def test_of_several_trajectories_only_the_first_starts_from_zero():
    """The first is the one trajectory of a start at zero, the others are those of a start from noise."""
    model, config = made(**{"denoise.solver": "euler", "denoise.noise.sigma_max": 50.0, "evaluation.trajectories": 3})
    batch, random = problems(5, 4), StepRandom(config.seed, 0, count=2)
    solver = Solver(model, batch)
    runs = [solver.run(4, random, stream=stream, start=start).logits
            for stream, start in (("", "zero"), ("trajectory1 ", "noise"), ("trajectory2 ", "noise"))]
    zero, _ = made(**{"denoise.solver": "euler", "denoise.noise.sigma_max": 50.0, "denoise.start": "zero"})
    mean = torch.stack(runs).softmax(-1).mean(0).argmax(-1)
    assert torch.equal(answer(zero, batch, [4], config)[4].answers, mean)
    assert not torch.equal(runs[0], solver.run(4, random).logits)


# ---- the measures of an exit, by hand


def taken(exit, logits, latents, batch, gate=None):
    """After how many of the given steps each problem has left."""
    stopping = EarlyExit(batch, exit, gate=gate)
    for step_logits, latent in zip(logits, latents, strict=True):
        rows = stopping.working
        if len(rows):
            stopping.take(step_logits[rows], latent[rows])
    return stopping.used.tolist()


def test_each_exit_measures_what_it_says_over_the_cells_that_are_sought():
    scored = torch.tensor([[True, True, False], [True, True, False]])
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long), scored, causal=False)
    moving = torch.tensor([[[4.0, 0.0], [4.0, 0.0], [0.0, 9.0]], [[0.0, 4.0], [4.0, 0.0], [0.0, 9.0]]])
    still = torch.tensor([[[4.0, 0.0], [4.0, 0.0], [9.0, 0.0]], [[4.0, 0.0], [4.0, 0.0], [9.0, 0.0]]])
    steps, latents = [moving, still, still, still], [moving, still, still, still]
    assert taken(Exit.parse("answer=2"), steps, latents, batch) == [2, 3]
    assert taken(Exit.parse("answer=3"), steps, latents, batch) == [3, 4]
    assert taken(Exit.parse("kl=1e-6"), steps, latents, batch) == [2, 3]
    assert taken(Exit.parse("latent=1e-6"), steps, latents, batch) == [2, 3]
    sure = 1 / (1 + torch.tensor(-4.0).exp().item())  # of the cells that are sought; the third would say 0.9999
    assert taken(Exit.parse(f"confidence={sure - 1e-6!r}"), steps, latents, batch) == [1, 1]
    assert taken(Exit.parse(f"confidence={sure + 1e-6!r}"), steps, latents, batch) == [4, 4]
    assert taken(Exit.parse("entropy=1e-6"), steps, latents, batch) == [2, 2]  # entropy does not know which symbol


def test_the_exit_by_a_gate_leaves_with_the_last_cell_that_is_sought():
    """1 - (1 - lambda)^i in each cell, of gates that say 0.5, 0.2 and, where nothing is sought, 0.01."""
    scored = torch.tensor([[True, False, True], [True, False, False]])
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long), scored, causal=False)
    gate, leaves = ExitGate(1), torch.tensor([0.5, 0.01, 0.2])
    gate.weight.data.fill_(1)
    latents, logits = [leaves.logit().expand(2, 3).unsqueeze(-1)] * 12, [torch.zeros(2, 3, 2)] * 12
    for threshold, used in ((0, [1, 1]), (0.19, [1, 1]), (0.21, [2, 1]), (0.49, [4, 1]), (0.51, [4, 2]), (0.9, [11, 4]),
                            (1, [12, 12]), (2, [12, 12])):
        expected = [next((i for i in range(1, 12) if 1 - (1 - least) ** i >= threshold and threshold < 1), 12)
                    for least in (0.2, 0.5)]
        assert taken(Exit.parse(f"gate={threshold}"), logits, latents, batch, gate) == expected == used


@pytest.mark.parametrize(("text", "words"), [("kll", "did you mean 'kl'"), ("kl=", "no threshold"),
                                             ("kl=-1", "or more"), ("latent=x", "latent=0.03")])
def test_an_exit_that_is_none_is_one_sentence(text, words):
    with pytest.raises(UserError, match=words):
        Exit.parse(text)


def test_an_exit_by_a_head_that_is_not_there_is_one_sentence():
    model, config = made("full")
    with pytest.raises(UserError, match="--objective one-step"):
        answer(model, problems(3), [2], config, exit=Exit.parse("head"))


@pytest.mark.parametrize("objective", ["full", "denoise"])
def test_an_exit_by_a_gate_that_is_not_there_is_one_sentence(objective):
    """A denoiser never has one: the loop's states are what it reads."""
    model, config = made(objective, **{"model.exit_gate": objective == "denoise"})
    with pytest.raises(UserError, match=r"--model.exit_gate true and --recurrence.loss_on gate, or") as error:
        answer(model, problems(3), [2], config, exit=Exit.parse("gate"))
    assert "\n" not in str(error.value)
