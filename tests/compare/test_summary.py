"""Summary of an arm over its seeds: paired differences, spreads, and the budget at which a curve reaches a loss."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from looped.compare.compute_to_target import reaches, sentence, sentences
from looped.compare.curve import crossing
from looped.compare.plan import make_plan
from looped.compare.summary import FOLLOWED, difference, gap, spread
from looped.compare.text_measure import NEXT_TOKEN
from looped.compare.text_summary import summarise_texts
from looped.compare.text_table import text_notes, text_table
from looped.config import load_config
from looped.evaluation.intervals import Clusters, confidence_interval


def line(step, loss):
    return {"step": step, "next_token": loss, "seconds": step / 2, "tokens": 10 * step, "layer_forwards": 100 * step}


def test_a_spread_is_mean_and_sample_deviation_and_one_seed_has_none():
    assert (spread([1.0, 3.0]).mean, spread([1.0, 3.0]).sd) == (2, pytest.approx(math.sqrt(2)))
    assert math.isnan(spread([1.0]).sd)


def test_a_crossing_lies_on_the_straight_line_between_two_evaluations():
    curve = [line(2, 5.0), line(4, 4.0), line(8, 3.0)]
    assert crossing(curve, 4.25, NEXT_TOKEN) == {"seconds": 1.75, "tokens": 35, "layer_forwards": 350, "early": False}
    assert crossing(curve, 3.0, NEXT_TOKEN)["tokens"] == 80
    assert crossing(curve, 5.5, NEXT_TOKEN) == {"seconds": 1, "tokens": 20, "layer_forwards": 200, "early": True}
    assert crossing(curve, 2.9, NEXT_TOKEN) is None


def test_the_first_crossing_counts_where_a_curve_goes_up_again():
    assert crossing([line(1, 5.0), line(2, 3.0), line(3, 6.0), line(4, 3.0)], 4.0, NEXT_TOKEN)["tokens"] == 15


def test_differences_are_paired_by_sequence_and_seed(made_up):
    generator = torch.Generator().manual_seed(0)
    hard = 4 + 2 * torch.randn(40, generator=generator, dtype=torch.float64)  # sequences differ far more than arms
    first = [made_up("ar", seed, (hard + seed).tolist()) for seed in range(2)]
    second = [made_up("denoise", seed, (hard + seed - 0.1 + 0.01 * torch.randn(40, generator=generator)).tolist())
              for seed in (1, 0)]
    found = difference(second, first, FOLLOWED, FOLLOWED)
    assert found.mean == pytest.approx(-0.1, abs=0.01)
    assert -0.11 < found.ci_low < found.mean < found.ci_high < -0.09
    assert (found.to, found.num_seeds) == ("ar", 2)
    low, high = confidence_interval(second[0].followed)
    assert high - low > 50 * (found.ci_high - found.ci_low)  # what pairing is worth


def test_differences_and_gains_are_over_the_documents_of_the_sequences(made_up):
    """Half of the sequences are of one document, on which alone the second arm is better."""
    labels = torch.cat([torch.zeros(40, dtype=torch.long), torch.arange(1, 21).repeat(2)])
    clusters = Clusters(labels, torch.zeros_like(labels))
    hard = 4 + torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = {"ar": hard, "denoise": hard - 0.1 * (labels == 0)}

    def compared(**fields):
        return [[replace(made_up(name, seed, losses[name].tolist()), **fields) for seed in range(2)] for name in losses]

    first, second = compared(clusters=clusters)
    found, apart = difference(second, first, FOLLOWED, FOLLOWED), gap(second, first)
    assert (found.mean, apart.mean) == pytest.approx((-0.05, -0.05))
    assert (found.ci_low, found.ci_high) == (apart.low, apart.high) == confidence_interval(
        losses["denoise"] - losses["ar"], clusters)
    assert (apart.num, apart.units, apart.told, found.units) == (21, "documents", False, "documents")
    assert apart.examples == "80 held-out sequences of 21 documents"
    alone = gap(*reversed(compared()))
    assert (alone.num, alone.units, alone.told) == (80, "sequences", True)  # the claim without documents
    summaries = summarise_texts([*first, *second])
    said = " ".join(text_notes(summaries, make_plan(load_config(None), "ar,denoise", budget=("tokens", 5), num_seeds=2,
                                                    depths=None, out=Path("out"))))
    assert "the same 80 held-out sequences of 21 documents" in said
    assert "bootstrap over documents" in said


def test_seeds_that_only_one_arm_has_are_left_out_of_differences(made_up):
    first, second = [made_up("ar", 0, [4.0, 5.0])], [made_up("denoise", seed, [3.0 + seed, 4.0]) for seed in range(2)]
    assert difference(second, first, FOLLOWED, FOLLOWED).mean == -1
    assert difference(second[1:], first, FOLLOWED, FOLLOWED) is None


def test_reaching_a_loss_is_a_share_of_the_own_seconds_and_of_what_the_other_spent(made_up):
    slow = made_up("truncated", 0, [4.0] * 8, [(10, 5.0), (20, 4.0)], seconds_a_step=2.0)
    fast = made_up("denoise", 0, [3.0] * 8, [(10, 5.0), (20, 3.0), (40, 2.0)])
    found = {(each.arm, each.to): each for each in reaches(summarise_texts([slow, fast]))}
    assert set(found) == {("denoise", "truncated")}
    reach = found["denoise", "truncated"]
    assert reach.own == 15 / 40
    assert reach.shares == {"seconds": 15 / 40, "tokens": 15 / 20, "layer_forwards": 15 / 20}
    assert sentence(reach) == (
        "denoise reaches truncated's final loss (4.000) after 0.38 of its own training time, which is 0.38 of "
        "truncated's seconds, 0.75 of truncated's tokens and 0.75 of truncated's layer forwards (1 seed: spread "
        "between seeds unknown).")


def test_reaching_is_told_to_the_first_arm_and_to_truncated(made_up):
    runs = [made_up(name, 0, [4.0, 4.0]) for name in ("ar", "truncated", "denoise")]
    assert [(each.arm, each.to) for each in reaches(summarise_texts(runs))] == [
        ("truncated", "ar"), ("denoise", "ar"), ("ar", "truncated"), ("denoise", "truncated")]


def test_what_is_not_reached_or_reached_at_once_is_said(made_up):
    good = [made_up("ar", seed, [3.0] * 8, [(1, 4.0), (2, 3.0)]) for seed in range(2)]
    mixed = [made_up("denoise", seed, [2.9] * 8, [(1, 3.5), (2, low)]) for seed, low in ((0, 2.5), (1, 3.4))]
    bad = [made_up("full", seed, [8.0] * 8, [(1, 9.0), (2, 8.0)]) for seed in range(2)]
    said = sentences(reaches(summarise_texts([*good, *mixed, *bad])))
    assert "in 1 of 2 seeds after 0.75" in said[0]
    assert said[1] == "full does not reach ar's final loss (3.000)."
    early = reaches(summarise_texts([*bad, *good]))
    assert "after at most 0.50 of its own training time" in sentence(early[0])


def test_the_table_has_a_line_an_arm_and_says_what_it_means(made_up):
    plan = make_plan(load_config(None), "ar,denoise", budget=("tokens", 5), num_seeds=2, depths=None,
                     out=Path("out"))
    arms = summarise_texts([made_up(name, seed, [4.0, 5.0 + seed]) for seed in range(2) for name in ("ar", "denoise")])
    table = text_table(arms, plan)
    header, lines = table.header, table.lines
    assert [line[0] for line in lines] == ["ar", "denoise"]
    assert all(len(line) == len(header) for line in lines)
    assert lines[0][header.index("next token")] == "4.750 ± 0.354"
    assert lines[1][header.index("against ar")] == "+0.000 [+0.000, +0.000]"
    said = " ".join(text_notes(arms, plan))
    assert all(name in said for name in ("sigma_max", "depth n", "distinct-2", "bootstrap"))
    assert "Arms with unfinished seeds" not in said
    few = [arms[0], *summarise_texts(arms[1].runs[:1])]
    assert "Arms with unfinished seeds: denoise" in " ".join(text_notes(few, plan))
