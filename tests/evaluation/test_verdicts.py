"""Every verdict on a curve that is made for it, none of them on noise; the saturation fit beside scipy's."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit

from looped.evaluation.depth_verdicts import NATS, SOLVED, Measure, flips, honestly_best, periods_of, verdict
from looped.evaluation.saturation import fit_saturation

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
NUM = 256


def generator(seed):
    return torch.Generator().manual_seed(seed)


def solved(shares, seed=0):
    """Problems that have a threshold each: one is solved at a depth where the share is above it."""
    threshold = torch.rand(NUM, generator=generator(seed))
    return {depth: threshold < share for depth, share in zip(DEPTHS, shares, strict=True)}


@pytest.mark.parametrize(("shares", "name"), [
    ((0.0,) * 7, "never"),
    ((0.1, 0.3, 0.6, 0.8, 0.9, 0.97, 0.99), "improves"),
    ((0.1, 0.4, 0.7, 0.9, 0.9, 0.9, 0.9), "settles"),
    ((0.9,) * 7, "settles"),
    ((0.1, 0.4, 0.7, 0.9, 0.9, 0.89, 0.86), "drifts"),
    ((0.1, 0.4, 0.7, 0.9, 0.98, 0.9, 0.71), "overthinks"),
])
def test_the_verdict_on_a_curve_made_for_it(shares, name):
    found = verdict(solved(shares), trained=8)
    assert found.name == name
    assert found.sentence.startswith(f"{name}: ")


def test_the_sentence_gives_the_figures_that_decide():
    by_depth = solved((0.1, 0.4, 0.7, 0.9, 0.98, 0.9, 0.71))
    found = verdict(by_depth, trained=8)
    means = {depth: right.double().mean() for depth, right in by_depth.items()}
    assert (found.best, found.deepest) == (16, 64)
    assert found.from_best.mean == pytest.approx(float(means[64] - means[16]))
    assert found.from_best.low < found.from_best.mean < found.from_best.high < 0
    change = f"{-found.from_best.mean:.2f} [{-found.from_best.high:.2f}, {-found.from_best.low:.2f}]"
    assert found.sentence == (f"overthinks: falls from {means[16]:.2f} at 16 to {means[64]:.2f} solved at 64 steps, "
                              f"{change} paired over 256 problems")


def test_what_improves_depends_on_what_was_trained():
    by_depth = solved((0.1, 0.3, 0.6, 0.8, 0.9, 0.97, 0.97))
    assert verdict(by_depth, trained=8).name == "improves"
    assert verdict(by_depth, trained=32).name == "settles"
    assert verdict(by_depth).name == "improves"  # from the first depth
    assert verdict(by_depth, trained=8).from_trained.mean > verdict(by_depth, trained=16).from_trained.mean > 0


def test_noise_alone_settles():
    """Right and wrong drawn anew at each depth: the best of seven is higher than the last, and no loss is found."""
    names = []
    for seed in range(40):
        gen = generator(seed)
        names.append(verdict({depth: torch.rand(NUM, generator=gen) < 0.8 for depth in DEPTHS}, trained=1).name)
    assert names.count("settles") >= 36  # 2.5 % of them each way
    drift = [verdict(solved((0.9, 0.9, 0.9, 0.9, 0.9, 0.89, 0.86), seed), trained=8).name for seed in range(40)]
    assert drift.count("settles") <= 4  # and a small loss is found


def test_the_best_of_noise_is_not_biased():
    """What each half of the problems has at the depth that is best for the other, beside what it has at its own."""
    honest, picked = [], []
    for seed in range(200):
        gen = generator(seed)
        noise = {depth: torch.randn(64, generator=gen, dtype=torch.float64) for depth in DEPTHS}
        honest.append(honestly_best(noise).mean())
        picked.append(max(values.mean() for values in noise.values()))
    error = 1 / math.sqrt(64 * 200)
    assert abs(torch.stack(honest).mean()) < 4 * error
    assert torch.stack(picked).mean() > 10 * error


def test_a_loss_and_a_share_have_one_rule():
    shares = (0.1, 0.4, 0.7, 0.9, 0.98, 0.9, 0.71)
    losses = {depth: 3 - right.double() for depth, right in solved(shares).items()}
    theirs, mine = verdict(losses, NATS, trained=8), verdict(solved(shares), trained=8)
    assert (theirs.name, theirs.from_best, theirs.best) == (mine.name, mine.from_best, mine.best)
    assert "quality falls from 2.01 at 16 to 2.25 nats at 64 steps" in theirs.sentence
    chance = Measure("nats", "sequences", False, chance=math.log(2))
    coin = {depth: math.log(2) + torch.randn(NUM, generator=generator(depth)) for depth in DEPTHS}
    assert verdict(coin, chance).name == "never"
    assert verdict({depth: values - 1 for depth, values in coin.items()}, chance).name == "settles"


def test_guessing_among_four_never_solves():
    guessed = {depth: torch.rand(NUM, generator=generator(depth)) < 0.25 for depth in DEPTHS}
    assert verdict(guessed, Measure("solved", "problems", True, 0.25)).name == "never"
    assert verdict(guessed, SOLVED).name == "settles"


def going_round(share, period, steps=32):
    """Answers of five cells that settle at step 8, but for a share of the problems that go round in so many steps."""
    answers = torch.randint(1, 5, (steps, NUM, 5), generator=generator(0))
    answers[8:] = answers[8]
    going = torch.arange(NUM) < share * NUM
    for step in range(8, steps):
        answers[step, going, 0] = 1 + step % period
    return answers


@pytest.mark.parametrize("period", [2, 3, 5])
def test_answers_that_go_round_are_cycles(period):
    found = periods_of(going_round(0.25, period))
    assert found.tolist() == [period] * 64 + [1] * 192
    flat = solved((0.1, 0.4, 0.7, 0.9, 0.9, 0.9, 0.9))  # right all the while
    said = verdict(flat, trained=8, answers=going_round(0.25, period))
    assert said.name == "cycles"
    assert f"most often every {period} steps" in said.sentence
    assert "cycles: 0.25 [" in said.sentence
    assert verdict(flat, trained=8, answers=going_round(0.02, period)).name == "settles"


def test_answers_drawn_anew_have_no_period():
    answers = torch.randint(2, (32, NUM, 3), generator=generator(0))
    assert (periods_of(answers) == 0).float().mean() > 0.99
    assert verdict(solved((0.9,) * 7), answers=answers).name == "settles"
    assert periods_of(answers[:8]) is None


def test_right_and_wrong_at_consecutive_depths_show_cycles_too():
    right = torch.ones(16, NUM, dtype=torch.bool)
    right[::2, :64] = False
    by_depth = {1 + step: each for step, each in enumerate(right)}
    assert verdict(by_depth, trained=4).name == "cycles"
    assert flips({depth: by_depth[depth].double() for depth in (1, 2, 4, 8, 16)}) is None
    noise = {depth: torch.rand(NUM, generator=generator(depth)) < 0.9 for depth in range(1, 17)}
    assert verdict(noise, trained=4).name == "settles"


def test_a_difference_within_its_interval_is_no_better_and_no_worse():
    noise = {depth: torch.rand(NUM, generator=generator(depth)) < 0.8 for depth in DEPTHS}
    said = verdict(noise, trained=1).sentence
    assert "no significant difference" in said
    assert "better" not in said
    assert "worse" not in said
    small = verdict(solved((0.9, 0.9, 0.9, 0.97, 0.97, 0.97, 0.965)), trained=8).sentence
    assert ("worse by" in small) or ("no significant difference" in small)


def test_one_problem_of_sixteen_is_not_said_to_be_at_chance():
    one = {depth: torch.arange(16) == 3 for depth in DEPTHS}
    assert "0.06 solved at its best depth 1, not distinguishable from chance (0.00)" in verdict(one).sentence


# ---- saturation ------------------------------------------------------------------------------------------------------

def curve(depths, q_inf, z, rate):
    return q_inf + z * np.exp(-rate * np.asarray(depths, dtype=float))


@pytest.mark.parametrize(("q_inf", "z", "rate"), [(0.95, -0.9, 0.3), (0.6, -0.2, 0.08), (0.45, -0.6, 1.2)])
def test_the_fit_finds_what_made_the_curve(q_inf, z, rate):
    means = dict(zip(DEPTHS, curve(DEPTHS, q_inf, z, rate).tolist(), strict=True))
    fit, said = fit_saturation(means)
    assert (fit.q_inf, fit.z, fit.rate) == pytest.approx((q_inf, z, rate), rel=1e-5)
    assert fit.residual < 1e-6
    gain = (fit.at(fit.depth_95) - means[1]) / (q_inf - means[1])
    assert gain == pytest.approx(0.95, abs=1e-6)
    assert f"95 % of the gain by {fit.depth_95:.1f} steps" in said


@pytest.mark.parametrize("sign", [1, -1])
def test_the_fit_is_that_of_scipy_on_noise_too(sign):
    """scipy.optimize.curve_fit, a least-squares search in all three numbers at once."""
    noise = np.random.default_rng(0).normal(0, 0.02, len(DEPTHS))
    quality = sign * (curve(DEPTHS, 0.9, -0.8, 0.25) + noise)
    (q_inf, z, rate), _ = curve_fit(curve, DEPTHS, quality, p0=(quality[-1], quality[0] - quality[-1], 0.3))
    fit, _ = fit_saturation(dict(zip(DEPTHS, quality.tolist(), strict=True)), higher_is_better=sign > 0)
    assert (fit.q_inf, fit.z, fit.rate) == pytest.approx((q_inf, z, rate), rel=1e-3)
    assert fit.residual == pytest.approx(np.sqrt(np.mean((quality - curve(DEPTHS, q_inf, z, rate)) ** 2)), rel=1e-6)


@pytest.mark.parametrize(("quality", "why"), [
    ((0.5, 0.6, 0.7), "3 depths are too few"),
    ((0.9, 0.901, 0.9, 0.902, 0.9, 0.9, 0.9), "flat"),
    ((0.98, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6), "gets worse with depth, from 0.98 at 1 to 0.60 at 64"),
    ((0.1, 0.9, 0.2, 0.8, 0.9, 0.3, 0.8), "explains"),
    ((0.1, 0.11, 0.13, 0.17, 0.25, 0.41, 0.73), "not saturated at 64 steps"),
    ((0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9), "between depth 1 and 2, too fast"),
])
def test_a_curve_that_does_not_saturate_is_said_why(quality, why):
    fit, said = fit_saturation(dict(zip(DEPTHS, quality, strict=False)))
    assert fit is None
    assert why in said


@pytest.mark.slow
def test_noise_over_depth_saturates_nowhere():
    """A few problems right or wrong by chance make means that an exponential fits now and then."""
    fits, backed = 0, 0
    for seed in range(400):
        gen = generator(seed)
        noise = {depth: torch.rand(16, generator=gen) < 0.5 for depth in (1, 4, 16, 64)}
        means = {depth: each.double().mean().item() for depth, each in noise.items()}
        fits += fit_saturation(means)[0] is not None
        backed += fit_saturation(means, per_example=noise)[0] is not None
    assert fits >= 8
    assert backed <= fits / 3
    rising = solved((0.1, 0.5, 0.75, 0.85, 0.9, 0.91, 0.91))
    means = {depth: each.double().mean().item() for depth, each in rising.items()}
    assert fit_saturation(means, per_example=rising) == fit_saturation(means)
    assert fit_saturation(means, per_example=rising)[0] is not None
