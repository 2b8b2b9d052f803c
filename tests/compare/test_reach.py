"""A comparison finds nothing between arms that are the same, and still finds what is there."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from looped.compare.accuracy_summary import summarise_shares
from looped.compare.compute_to_target import reach, reaches, sentence, sentences, with_reverse
from looped.compare.plan import RunSpec
from looped.compare.summary import Gap
from looped.compare.task_measure import TaskMeasured
from looped.compare.text_measure import TextMeasured
from looped.compare.text_summary import summarise_texts
from looped.config import load_config
from looped.config.arms import Arm
from looped.evaluation.intervals import student_interval

EVALS = 20
FLAGS = {"share": {"task.name": "prefix-sums", "task.difficulty": [1, 4], "denoise.context": "inject"}, "loss": {}}
CONFIGS = {kind: {name: load_config(None, flags | {"objective": name, "recurrence.mean": 2})
                  for name in ("full", "truncated")} for kind, flags in FLAGS.items()}
SUMMARISE = {"share": summarise_shares, "loss": summarise_texts}


def spent(step):
    return {"step": step, "seconds": step / 2, "tokens": 10 * step, "layer_forwards": 100 * step}


def share_run(name, seed, gen, *, final, rate=3.0, num=64):
    """A run whose share solved rises to `final`, measured on `num` problems drawn anew each time."""
    shares = [final * -math.expm1(-rate * step / EVALS) / -math.expm1(-rate) for step in range(1, EVALS + 1)]
    curve = [spent(step) | {"solved": (torch.rand(num, generator=gen) < share).double().mean().item()}
             for step, share in enumerate(shares, start=1)]
    right = (torch.rand(num, generator=gen) < final).double()
    return measured(TaskMeasured, "share", name, seed, curve, {4: {2: right}})


def loss_run(name, seed, gen, *, final, rate=5.0, num=64):
    """A run whose loss falls to `final`, on sequences that differ far more than two runs do."""
    hard = 0.3 * torch.randn(num, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    noise = 0.03 * torch.randn(EVALS + 1, num, generator=gen, dtype=torch.float64)
    final += 0.02 * torch.randn((), generator=gen).item()  # what the seed does
    losses = [final + 3 * math.exp(-rate * step / EVALS) + hard + each for step, each in enumerate(noise, start=1)]
    curve = [spent(step) | {"next_token": each.mean().item()} for step, each in enumerate(losses[:-1], start=1)]
    return measured(TextMeasured, "loss", name, seed, curve, {"nats_per_token": {2: losses[-1]}}, [])


def measured(kind, figure, name, seed, curve, *results):
    config = CONFIGS[figure][name]
    return kind(RunSpec(Arm(name, name, config, name), seed, Path(f"{name}-{seed}")), [], {}, curve, *results)


MAKE = {"share": share_run, "loss": loss_run}


def compared(figure, first, second, *, seed=0, num_seeds=3):
    """Both directions of a comparison of two arms, of these settings."""
    gen = torch.Generator().manual_seed(seed)
    runs = [MAKE[figure](name, each, gen, **settings) for name, settings in (("full", first), ("truncated", second))
            for each in range(num_seeds)]
    return reaches(SUMMARISE[figure](runs))


@pytest.mark.parametrize(("figure", "settings"), [
    ("share", {"final": 0.03, "num": 16}), ("share", {"final": 0.5}), ("share", {"final": 0.95}),
    ("loss", {"final": 3.5})])
def test_two_arms_that_are_the_same_are_not_told_apart(figure, settings):
    """Of many comparisons no more than a test at 5 % lets through; before, each crossing was a finding."""
    found = [each for seed in range(25) for each in compared(figure, settings, settings, seed=seed)]
    crossed = [each for each in found if each.num_reached]
    assert len(crossed) > len(found) / 2
    assert sum(each.told for each in found) <= 0.12 * len(found)


@pytest.mark.parametrize(("figure", "better", "worse"), [
    ("share", {"final": 0.9, "num": 512}, {"final": 0.4, "num": 512}), ("loss", {"final": 3.2}, {"final": 3.6})])
def test_an_arm_that_is_better_is_found(figure, better, worse):
    for seed in range(10):
        ahead, behind = compared(figure, worse, better, seed=seed)
        assert (ahead.arm, ahead.told, behind.told) == ("truncated", True, True)
        assert sentence(ahead).startswith("truncated reaches full's final")
        assert sentence(behind).startswith("full does not reach truncated's final") or behind.num_reached


def test_an_arm_that_is_only_faster_is_found_though_both_end_alike():
    slow, fast = {"final": 1.0, "rate": 0.5, "num": 256}, {"final": 1.0, "rate": 40.0, "num": 256}
    ahead, behind = compared("share", slow, fast)
    assert not ahead.gap.told  # all is solved by both
    assert ahead.told
    assert ahead.own < 0.3
    assert not behind.told
    assert len(sentences([ahead, behind])) == 2


def test_noise_between_arms_that_solve_next_to_nothing_is_said_to_be_noise():
    """Shares of 0.00 to 0.06 of 16 problems, two seeds: the crossing is one problem."""
    def run(name, seed, solved):
        curve = [spent(step) | {"solved": share / 16} for step, share in enumerate(solved, start=1)]
        right = torch.zeros(16, dtype=torch.float64)
        right[1 : 2 * solved[-1] : 2] = 1
        return measured(TaskMeasured, "share", name, seed, curve, {4: {2: right}})

    arms = summarise_shares([run("truncated", 0, [0, 0, 0, 1]), run("truncated", 1, [0, 0, 0, 0]),
                             run("full", 0, [1, 0, 0, 1]), run("full", 1, [0, 1, 0, 0])])
    found = with_reverse(reaches(arms), arms)
    assert any(each.num_reached for each in found)
    assert sentences(found) == [
        "No reliable difference between full (0.031) and truncated's final share solved (0.031): +0.000 [+0.000, "
        "+0.000] paired over 8 held-out problems, +0.000 to +0.000 by seed, 2 seeds."]
    assert found[0].as_dict()["told"] is False


@pytest.mark.parametrize(("seeds", "num", "why"), [
    ((-0.179, -0.093), 16, "2 seeds; the 95 % interval over seeds, [-0.682, +0.410], includes 0."),
    ((-0.2, -0.2), 5, "2 seeds; fewer than 6 tell no sign."),
    ((-0.179, -0.093), 5, "fewer than 6 tell no sign, and the 95 % interval over seeds, [-0.682, +0.410], includes 0."),
])
def test_an_interval_that_excludes_zero_and_is_no_reliable_difference_says_why(seeds, num, why):
    """Student's t of two seeds reaches 12.706 / sqrt(2) standard deviations."""
    found = compared("loss", {"final": 1.0}, {"final": 1.0}, num_seeds=2)[0]
    paired = (num, "sequences", f"{num} held-out sequences", seeds)
    said = sentence(replace(found, gap=Gap(-0.136, -0.167, -0.105, *paired)))
    assert said.endswith(why)
    plain = sentence(replace(found, gap=Gap(0.0, -0.1, 0.1, *paired)))
    assert plain.endswith("2 seeds.")


def test_five_examples_tell_no_sign_and_six_do():
    """Five signs agree by chance in a sixteenth of the cases."""
    def arms(num):
        return summarise_shares([measured(TaskMeasured, "share", name, 0, [spent(1) | {"solved": share}],
                                          {4: {2: torch.full((2 * num,), share, dtype=torch.float64)}})
                                 for name, share in (("full", 0.0), ("truncated", 1.0))])

    assert not reach(*arms(5)).told
    assert reach(*arms(6)).told


def test_seeds_that_disagree_tell_nothing_however_many_the_problems():
    def run(name, seed, share):
        right = torch.arange(2000) < 2000 * share
        return measured(TaskMeasured, "share", name, seed, [spent(1) | {"solved": share}, spent(2) | {"solved": share}],
                        {4: {2: right.double()}})

    arms = summarise_shares([*(run("full", seed, 0.5) for seed in range(3)),
                             *(run("truncated", seed, share) for seed, share in enumerate((0.4, 0.9, 0.7)))])
    found = reaches(arms)[0]
    assert found.gap.low > 0
    assert not found.told
    assert "-0.100 to +0.400 by seed, 3 seeds" in sentence(found)


@pytest.mark.parametrize("num", [2, 3, 8, 17, 40])
def test_the_interval_over_seeds_is_students(num):
    values = torch.randn(num, generator=torch.Generator().manual_seed(num), dtype=torch.float64)
    low, high = student_interval(values.tolist())
    expected = stats.t.interval(0.95, num - 1, values.mean().item(), stats.sem(values.numpy()))
    wider = 1.06 if num > 16 else 1.0005
    assert low <= expected[0] + 1e-3
    assert (high - low) / (expected[1] - expected[0]) == pytest.approx(1, abs=wider - 1)
    assert student_interval([1.0]) == (-math.inf, math.inf)
