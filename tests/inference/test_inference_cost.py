"""The layer passes that rows report are those that run: counted by a hook on every layer, for all that a config allows.
"""

import itertools
from contextlib import contextmanager

import pytest
import torch

from looped.config import load_config
from looped.data.image_batches import ImageSpec
from looped.data.images import ImageBatch
from looped.data.task_data import prepare_task
from looped.diffusion.samplers import SAMPLERS
from looped.errors import UserError
from looped.evaluation.depth_sweep import evaluate_depth
from looped.evaluation.image_samples import make_images
from looped.evaluation.likelihood import losses_by_depth, losses_by_solver
from looped.evaluation.solving import exit_rows, solved
from looped.inference.exits import Exit
from looped.inference.rollout import answer, rollout_of
from looped.models.build import build
from looped.nn.layers import TransformerLayer
from looped.objectives import build_objective

pytestmark = pytest.mark.usefixtures("unchecked")

NUM, VOCAB, LENGTH = 3, 11, 4
PICTURE = ImageSpec(1, 4, 4, 2)
SMALL = {"model.width": 4, "model.num_heads": 1, "model.ffn_width": 4, "model.num_core_layers": 3,
         "model.num_prelude_layers": 1, "model.num_coda_layers": 2, "denoise.cond_width": 2,
         "denoise.target.dim": 4, "noprop.dim": 4, "data.length": LENGTH,
         "evaluation.prompt_length": 2, "evaluation.num_problems": NUM,
         "evaluation.batch_size": 2, "recurrence.mean": 2, "recurrence.distribution": "fixed"}
BLOCKS = {"blocks.num": 2, "blocks.layers": [1, 2]}
DEPTHS = (1, 4)
TWICE = [{"model.core_runs": 2}]
WHOLE = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["part", "whole"])
"""The whole product takes minutes; a part of it has every choice several times."""
SOLVERS = tuple(SAMPLERS)
CONTEXTS = ("inject", "concat", "context")


class Passes:
    """Layer passes so far: of every call of a layer, the sequences of its batch."""

    def __init__(self):
        self.sequences = 0

    def __call__(self, layer, inputs, output):
        self.sequences += len(inputs[0])


@contextmanager
def passes(objective):
    counted = Passes()
    hooks = [layer.register_forward_hook(counted) for layer in objective.modules()
             if isinstance(layer, TransformerLayer)]
    yield counted
    for hook in hooks:
        hook.remove()


def allowed(*groups):
    """Every combination of settings, a choice out of each group, that a config allows."""
    found = []
    for choice in itertools.product(*groups):
        settings = {name: value for part in choice for name, value in part.items()}
        try:
            load_config(None, SMALL | settings)
        except UserError:
            continue
        found.append(settings)
    return found


def each(name, values):
    return [{name: value} for value in values]


def made(settings, vocab=VOCAB, picture=None):
    config = load_config(None, SMALL | settings)
    objective = build_objective(config, build(config, vocab, picture)).eval()
    with torch.no_grad():  # away from the start, where problems settle together
        for parameter in objective.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return objective, config


def tokens():
    return torch.randint(VOCAB, (NUM, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def some(ways, whole, *, start=0, stride):
    """(number, way) of all ways, or of every `stride`-th."""
    return [(number, way) for number, way in enumerate(ways) if whole or (number + start) % min(stride, len(ways)) == 0]


def named(settings):
    return " ".join(str(value) for value in settings.values())


# ---- text ------------------------------------------------------------------------------------------------------------

LOOPS = each("objective", ("full", "truncated", "progressive", "one-step", "fixed-point", "ar"))
TEXT = [*allowed(LOOPS, ({}, BLOCKS)),
        *allowed(each("objective", ("denoise", "blockwise")), ({}, BLOCKS),
                 each("denoise.context", CONTEXTS)),
        *allowed([{"objective": "denoise"}], each("denoise.context", CONTEXTS),
                 [{"denoise.block_size": 2, "denoise.order": order} for order in ("together", "left-to-right")]),
        *allowed([{"objective": "masked"}], ({}, BLOCKS), each("masked.schedule", ("linear", "cosine"))),
        *allowed(TWICE, [*LOOPS, {"objective": "masked"}]),
        *allowed(TWICE, each("objective", ("denoise", "blockwise")), ({}, BLOCKS), each("denoise.context", CONTEXTS))]


def skip_without_torchdeq(settings):
    if settings.get("objective") == "fixed-point":
        pytest.importorskip("torchdeq")


@pytest.mark.parametrize("settings", TEXT, ids=named)
def test_a_likelihood_costs_the_layers_that_run(settings):
    skip_without_torchdeq(settings)
    objective, _ = made(settings)
    for depth in DEPTHS:
        with passes(objective) as counted:
            losses_by_depth(objective, tokens(), [depth], batch_size=2)
        assert rollout_of(objective).likelihood_cost(depth).layer_forwards == counted.sequences / NUM > 0, depth


SOLVED_TEXT = allowed(each("objective", ("denoise", "blockwise")), ({}, BLOCKS),
                      each("denoise.context", CONTEXTS), [{"denoise.block_size": 1}, {"denoise.block_size": 2}])
SOLVED_TEXT += [settings | TWICE[0] for settings in SOLVED_TEXT if "blocks.num" not in settings]


@pytest.mark.parametrize("settings", SOLVED_TEXT, ids=named)
@WHOLE
def test_a_likelihood_by_the_solver_costs_the_layers_that_run(settings, whole):
    ways = [(solver, None) for solver in SOLVERS] + [("restart", 0.7)]
    for _, (solver, restart) in some(ways, whole, start=SOLVED_TEXT.index(settings), stride=4):
        objective, _ = made(settings | {"denoise.solver": solver, "denoise.restart_level": restart})
        for depth, trajectories in itertools.product(DEPTHS, (1, 2)):
            with passes(objective) as counted:
                losses_by_solver(objective, tokens(), [depth], num_trajectories=trajectories, batch_size=2)
            cost = rollout_of(objective).sampled_cost(depth, trajectories)
            assert cost.layer_forwards == counted.sequences / NUM > 0, (solver, depth, trajectories)


def test_rows_of_text_carry_the_cost():
    objective, _ = made({"objective": "denoise", "denoise.context": "inject", "denoise.solver": "heun"})
    rows = evaluate_depth(objective, tokens(), [1, 3], bytes_per_token=2.0, num_trajectories=2).rows
    found = {(row.metric, row.depth): (row.layer_forwards, row.evaluations) for row in rows if row.layer_forwards}
    assert found["nats_per_token", 3] == found["bits_per_byte", 3] == (1 + 3 * 5, 3)
    assert found["nats_by_solver", 3] == (1 + 2 * 5 * 2 * 5, 2 * 5 * 2)  # Heun; the noised truth beside each
    assert {row.trajectories for row in rows if row.metric == "nats_by_solver"} == {2}


# ---- problems --------------------------------------------------------------------------------------------------------

TRIES = allowed(each("evaluation.trajectories", (1, 3)), each("evaluation.choose", ("mean", "consistent")))
EXITS = [None, *map(Exit.parse, ("answer=2", "latent=0.5", "confidence=0.6"))]
LAYOUTS = each("task.layout", ("full", "causal"))
PROBLEMS = [*allowed([{"task.name": "prefix-sums"}], LOOPS, ({}, BLOCKS), LAYOUTS),
            *allowed([{"task.name": "prefix-sums"}], each("objective", ("denoise", "blockwise")),
                     ({}, BLOCKS), each("denoise.context", CONTEXTS), LAYOUTS,
                     each("denoise.order", ("together", "confidence"))),
            *allowed([{"task.name": "prefix-sums"}], TWICE, LOOPS, [{"task.layout": "full"}]),
            *allowed([{"task.name": "prefix-sums", "objective": "denoise"}], TWICE, each("denoise.context", CONTEXTS),
                     LAYOUTS, each("denoise.order", ("together", "confidence")))]


def counted_answer(objective, config, batch, depth, exit=None):
    """(layer passes per sequence, the answer that says what they were)."""
    with passes(objective) as counted:
        found = answer(objective, batch, [depth], config, exit=exit)[depth]
    return counted.sequences / len(batch), found


@pytest.mark.parametrize("settings", PROBLEMS, ids=named)
@WHOLE
def test_an_answer_costs_the_layers_that_run(settings, whole):
    skip_without_torchdeq(settings)
    denoises, early = settings["objective"] in ("denoise", "blockwise"), 0
    ways = allowed([settings], each("denoise.solver", SOLVERS), TRIES) if denoises else [settings]
    for number, more in some(ways, whole, start=PROBLEMS.index(settings), stride=6):
        objective, config = made(more, vocab=4)
        data = prepare_task(config.task)
        batch = data.collate([data.task.problem(0, index, 2 + index) for index in range(NUM)])
        exits = EXITS if whole else (None, EXITS[1 + number % 3])
        for exit, depth in itertools.product(exits, DEPTHS):
            run, found = counted_answer(objective, config, batch, depth, exit)
            assert found.layer_forwards.mean().item() == pytest.approx(run, rel=1e-12), (more, exit, depth)
            full = rollout_of(objective).answer_cost(depth, config.evaluation)
            if exit is None:
                assert set(found.layer_forwards.tolist()) == {full.layer_forwards}
                assert set(found.evaluations.tolist()) == {full.evaluations}
            early += bool((found.evaluations < full.evaluations).any())
    assert early or not whole  # else no exit was ever taken


@pytest.mark.parametrize(("settings", "evaluations"), [
    ({}, 4), ({"denoise.solver": "heun"}, 7), ({"evaluation.trajectories": 4}, 16),
    ({"evaluation.trajectories": 4, "evaluation.choose": "consistent"}, 48)], ids=str)
def test_rows_of_a_task_count_solver_trajectories_and_checks(settings, evaluations):
    """One layer and depth 4; the positive control is the first, where nothing multiplies."""
    one = {"task.name": "prefix-sums", "objective": "denoise", "denoise.context": "inject", "model.num_core_layers": 1,
           "model.num_prelude_layers": 0, "model.num_coda_layers": 0}
    objective, config = made(one | settings, vocab=4)
    data = prepare_task(config.task)
    with passes(objective) as counted:
        found = solved(objective, data, config, [4], [5])
    assert counted.sequences / NUM == evaluations
    several = {"solved_by_any"} if "evaluation.trajectories" in settings else set()
    assert {row.metric: (row.layer_forwards, row.evaluations) for row in found.rows} == dict.fromkeys(
        {"solved", "cells"} | several, (evaluations, evaluations))


@pytest.mark.parametrize("batch_size", [NUM, 3 * NUM], ids=["in turn", "together"])
def test_trajectories_of_a_loop_share_the_embedded_problem_whether_they_run_together_or_in_turn(batch_size):
    objective, config = made({"task.name": "prefix-sums", "objective": "full", "model.state_init": "like-init",
                              "evaluation.trajectories": 3, "evaluation.batch_size": batch_size}, vocab=4)
    data = prepare_task(config.task)
    batch = data.collate([data.task.problem(0, index, 4) for index in range(NUM)])
    run, found = counted_answer(objective, config, batch, 5)
    assert set(found.layer_forwards.tolist()) == {run}


def test_rows_with_an_exit_carry_the_mean_of_what_was_run():
    objective, config = made({"task.name": "prefix-sums", "objective": "full"}, vocab=4)
    data, rule = prepare_task(config.task), Exit.parse("latent=0.5")
    rows = {row.metric: row for part in exit_rows(objective, data, config, 6, [5], [rule]) for row in part}
    used = rows["steps_used"]
    assert used.evaluations == used.mean < 6
    assert used.layer_forwards == rows["solved_with_exit"].layer_forwards == pytest.approx(1 + used.mean * (3 + 2))
    assert rows["lost_by_exit"].layer_forwards is None


# ---- images ----------------------------------------------------------------------------------------------------------

IMAGES = {"images.source": "digits", "model.patch_size": 2}
LOCAL = {"model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.injection": "none", "model.block": "prenorm"}
NAMED = [*allowed([IMAGES], LOOPS, ({}, BLOCKS)),
         *allowed([IMAGES], each("objective", ("noprop-dt", "noprop-ct", "noprop-fm")), ({}, BLOCKS),
                  each("noprop.solver", ("euler", "posterior")), each("evaluation.trajectories", (1, 3))),
         *allowed([IMAGES | LOCAL | {"objective": "forward-forward"}], each("evaluation.trajectories", (1, 2))),
         *allowed([IMAGES | {"noprop.solver": "euler"}], TWICE, each("objective", ("full", "noprop-dt", "noprop-ct"))),
         *allowed([IMAGES | {"denoise.context": "inject", "denoise.context_dropout": 0.1}],
                  each("objective", ("denoise", "blockwise")), ({}, BLOCKS), each("denoise.solver", SOLVERS),
                  each("denoise.guidance", (1, 2)), TRIES)]


def images():
    return ImageBatch(torch.randn(NUM, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(NUM))


@pytest.mark.parametrize("rule", sorted({settings["objective"] for settings in NAMED}))
@WHOLE
def test_naming_an_image_costs_the_layers_that_run(rule, whole):
    skip_without_torchdeq({"objective": rule})
    for _, settings in some([each for each in NAMED if each["objective"] == rule], whole, stride=9):
        objective, config = made(settings, NUM, PICTURE)
        for depth in DEPTHS:
            run, found = counted_answer(objective, config, PICTURE.ask(images()), depth)
            assert set(found.layer_forwards.tolist()) == {run}, (settings, depth)
            assert rollout_of(objective).answer_cost(depth, config.evaluation).layer_forwards == run > 0


MADE = allowed([IMAGES | LOCAL | {"images.goal": "generate", "denoise.weight": "edm", "denoise.context": "inject"}],
               each("objective", ("denoise", "blockwise")), ({}, BLOCKS), each("denoise.solver", SOLVERS),
               each("denoise.schedule", ("karras", "quantile", "log-linear")))
MADE_TWICE = [settings | TWICE[0] for settings in (MADE[0], MADE[-1])]


@WHOLE
def test_making_an_image_costs_the_layers_that_run(whole):
    assert len(MADE) == 2 * len(SOLVERS) * 3
    for settings in [*(settings for _, settings in some(MADE, whole, stride=4)), *MADE_TWICE]:
        objective, _ = made(settings, NUM, PICTURE)
        for depth, guidance in itertools.product(DEPTHS, (1.0, 3.0)):
            with passes(objective) as counted:
                make_images(objective, torch.arange(NUM), depth, guidance=guidance, batch_size=2)
            cost = rollout_of(objective).image_cost(depth, guidance)
            assert cost.layer_forwards == counted.sequences / NUM > 0, (settings, depth, guidance)


def test_every_way_to_run_a_model_is_counted():
    """The combinations above are what a config allows, so an empty list would prove nothing."""
    rules = {settings["objective"] for settings in (*TEXT, *PROBLEMS, *NAMED, *MADE)}
    assert rules == {"full", "truncated", "progressive", "one-step", "fixed-point", "denoise", "blockwise", "masked",
                     "noprop-dt", "noprop-ct", "noprop-fm", "forward-forward", "ar"}
    assert {settings.get("denoise.context") for settings in SOLVED_TEXT} == set(CONTEXTS)
    assert {settings["task.layout"] for settings in PROBLEMS} == {"full", "causal"}
