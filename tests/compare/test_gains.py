"""The gain over the baseline and its price: signs, intervals, multiples of weights and of counted FLOPs."""

import json
from dataclasses import replace

import pytest
import torch

from looped.compare.comparison_kinds import TEXT
from looped.compare.gains import Gain, baseline_of, budget_curves, gains
from looped.compare.plan import make_plan
from looped.compare.report import write_report
from looped.compare.text_summary import summarise_texts
from looped.config import load_config
from looped.cost.counts import count

ARMS = "full recurrence.mean=4 recurrence.per_sequence=false,ar,denoise"
LOSSES = {"full": 3.0, "ar": 3.5, "denoise": 3.5, "fixed-point": 3.2}


@pytest.fixture(scope="module")
def arms(made_up, tmp_path_factory):
    """(plan, runs): `full` is half a nat better than `ar` on each sequence, `denoise` as good as it."""
    one_layer = {"model.num_prelude_layers": 0, "model.num_core_layers": 1, "model.num_coda_layers": 0}
    plan = make_plan(load_config(None, one_layer), ARMS, budget=("tokens", 5), num_seeds=1, depths=[1],
                     out=tmp_path_factory.mktemp("gains"))
    return plan, [run_of(made_up, place) for place in plan.places]


def run_of(made_up, place):
    """A run whose losses are higher by 0.2 with seed 1, for `full` alone."""
    own = LOSSES[place.config.objective] + 0.2 * place.seed * (place.config.objective == "full")
    losses = [own + i / 100 for i in range(40)]
    run = replace(made_up(place.config.objective, 0, losses), place=place)
    by_depth = {place.config.main_depth: torch.tensor(losses, dtype=torch.float64)}
    return replace(run, losses=run.losses | {"nats_per_token": by_depth})


@pytest.fixture(scope="module")
def gained(arms):
    """The gains of full, ar and denoise."""
    return gains(summarise_texts(arms[1]))


def test_the_baseline_is_the_arm_without_a_loop_wherever_it_stands(arms):
    summaries = summarise_texts(arms[1])
    assert baseline_of(summaries).name == "ar"
    assert baseline_of(summaries[:1]).name == summaries[0].name


def test_a_solver_that_stops_early_is_charged_with_the_applications_it_ran(made_up, tmp_path):
    """A run whose layer forwards are those of a lower limit has the FLOPs of that limit."""
    config = load_config(None, {"training.batch_size": 4, "data.vocab_size": 512})
    plan = make_plan(config, "fixed-point,ar", budget=("tokens", 5), num_seeds=1, depths=[1], out=tmp_path)
    place, ar = plan.places
    limit = place.config.fixed_point.max_steps
    lower = count(place.config.replace(**{"fixed_point.max_steps": limit - 3}), 512)
    full, part = (replace(run_of(made_up, place), place=place, costs={
        "step": 10, "tokens": 5, "seconds": 1, "peak_bytes": 0, "layer_forwards": 10 * 4 * layers})
        for layers in (count(place.config, 512).layer_forwards, lower.layer_forwards))
    base = run_of(made_up, ar)
    whole, early = (gains(summarise_texts([run, base]))[0].flops for run in (full, part))
    assert early / whole == pytest.approx(lower.step_flops / count(place.config, 512).step_flops, rel=1e-6)


def test_a_lower_loss_is_a_gain_and_none_is_within_noise(gained):
    full, ar, denoise = gained
    assert (full.gain, full.low, full.high) == pytest.approx((0.5, 0.5, 0.5))
    assert full.told
    assert full.by_seed == pytest.approx((0.5,))
    assert ar.by_seed == ()
    assert denoise.gain == pytest.approx(0, abs=1e-12)
    assert not denoise.told
    assert ar.gain is None


def test_weights_and_flops_are_multiples_of_the_baseline(arms, gained):
    (plan, runs), (full, ar, denoise) = arms, gained
    assert (ar.weights, ar.flops) == (1, 1)
    assert full.weights == 1
    assert denoise.weights > 1.1  # level conditioning and projections
    steps = {run.place.config.objective: run.costs["step"] for run in runs}
    flops = {arm.config.objective: count(arm.config, 1024).step_flops for arm in plan.arms}
    assert full.flops == pytest.approx(flops["full"] * steps["full"] / (flops["ar"] * steps["ar"]))
    assert 2 < full.flops / (steps["full"] / steps["ar"]) < 4  # four of its layer, one of the embeddings and the head


def test_the_report_has_table_plot_and_rows(arms):
    plan, runs = arms
    said = write_report(plan, TEXT, runs)
    table = said.split("## Gain and training compute")[1].split("##")[0]
    lines = {line.split("|")[1].strip().split()[0]: line for line in table.splitlines() if line.startswith("|")}
    assert "+0.500 [+0.500, +0.500]" in lines["full"]
    assert "100 %" in lines["full"]
    assert "(+0.000 [+0.000, +0.000])" in lines["denoise"].replace("-0.000", "+0.000")
    assert (plan.out / "plots" / "gain.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (plan.out / "compare.jsonl").read_text().splitlines()]
    assert next(row["gain"] for row in rows if row["kind"] == "gain") == pytest.approx(0.5)


def test_arms_that_differ_in_their_budget_alone_are_one_curve(made_up, tmp_path):
    plan = make_plan(load_config(None, {}), "full,ar,longer=ar optim.lr=0.1,shorter=ar optim.lr=0.2",
                     budget=("tokens", 5), num_seeds=1, depths=[1], out=tmp_path)
    full, ar, *others = plan.arms
    others = [replace(arm, config=ar.config.replace(**{"training.budget": budget}))
              for arm, budget in zip(others, (9, 2), strict=True)]
    arms = summarise_texts([run_of(made_up, place) for place in replace(plan, arms=[full, ar, *others]).places])
    found = [Gain(arm.name, 1.0, flops, 0.1, 0.0, 0.2, told=False)
             for arm, flops in zip(arms, (4.0, 1.0, 1.8, 0.4), strict=True)]
    curves = {name: [each.arm for each in curve] for name, curve in budget_curves(arms, found).items()}
    assert curves == {"full": ["full"], "ar": ["shorter", "ar", "longer"]}


def test_one_arm_alone_has_no_gain(arms):
    plan, runs = arms
    assert "Gain and training compute" not in write_report(replace(plan, arms=plan.arms[:1]), TEXT, runs[:1])


def test_with_several_seeds_the_gain_of_each_is_given(arms, made_up, tmp_path):
    """Half a nat with seed 0 and 0.3 with seed 1, in the table and in the rows; with one seed no column."""
    plan, one = arms
    two = replace(plan, num_seeds=2, out=tmp_path)
    full = gains(summarise_texts(runs := [run_of(made_up, place) for place in two.places]))[0]
    assert full.by_seed == pytest.approx((0.5, 0.3))
    assert full.gain == pytest.approx(0.4)
    said = write_report(two, TEXT, runs)
    assert "+0.500, +0.300 |" in said
    rows = [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    assert next(row["by_seed"] for row in rows if row["kind"] == "gain") == pytest.approx([0.5, 0.3])
    assert "by seed" not in write_report(plan, TEXT, one)
