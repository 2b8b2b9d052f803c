"""The table: figures stand where they belong, the paper's beside them, and what is missing has its reason."""

import math

import pytest

from looped.compare.matched_compute import LATER
from looped.reproduce.plan import Result, plan_entries
from looped.reproduce.table import report


@pytest.fixture
def tabled(order):
    """`tabled(rows of an entry and arm with its number, suite, **asked)`: (results, the text)."""
    def go(rows, name, missing=(), scale="cpu", **asked):
        asked = order(name, scale, seeds=2, **asked)
        results = [Result(entry, [row for number, arm in enumerate(asked.arms, 1) for row in rows(arm, number)],
                          dict(missing)) for entry in plan_entries(asked)]
        return results, report(asked, results)

    return go


def tables(text):
    """First column -> column -> cell, of each table; no cell is blank."""
    found = []
    for part in text.split("\n\n"):
        if part.startswith("|"):
            header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
            assert all(cell for line in lines for cell in line)
            found.append([dict(zip(header, line, strict=True)) for line in lines])
    return found


def of_seeds(kind, arm, value, **fields):
    return [{"kind": kind, "arm": arm, "seed": seed, "mean": value + seed / 10} | fields for seed in (0, 1)]


def equal(arm, budget, value, num=2):
    row = {"kind": "equal", "arm": arm, "budget": budget, "spent": {"seconds": 60.0, "layer_forwards": 5000.0}[budget]}
    return row | ({"mean": value, "sd": 0.05, "num": num} if num else {"num": 0})


def costs(arm, number):
    return of_seeds("cost", arm, 0, step=10 * number, layer_forwards=1234.0, seconds=56.0 * number)


def test_bits_a_byte_in_blocks_and_end_to_end(tabled):
    def rows(arm, number):
        difference = {"kind": "difference", "arm": arm, "to": "end-to-end", "mean": -0.25, "ci_low": -0.5,
                      "ci_high": 0.125, "num_seeds": 2}
        depths = [row for depth in (1, 3, 8, 64) for row in of_seeds("figure", arm, number + depth / 100, depth=depth,
                                                                     metric="bits_per_byte")]
        return [*of_seeds("figure", arm, number, metric="bits_per_byte_bound"), *depths, *costs(arm, number),
                *([difference] if number > 1 else [])]

    _, text = tabled(rows, "masked_table3")
    ((twin, blocks),) = tables(text)
    assert list(blocks.values()) == [
        "three-blocks", "2.050 ± 0.071", "2.060 ± 0.071", "2.130 ± 0.071", "2.690 ± 0.071", "-0.250 [-0.500, +0.125]",
        "20", "1,234", "112", "1.45"]
    assert (twin["arm"], twin["nats/token against end-to-end"], twin["the paper: bits/character, text8"]) == (
        "end-to-end", "-", "1.56")
    assert "Reproduces DiffusionBlocks (arXiv 2506.14202), table 3, MD4 on text8." in text
    assert "mean ± standard deviation over 2 seeds" in text


def test_images_stand_side_by_side_and_the_papers_figures_beside(tabled):
    def rows(arm, number):
        shares = [{"kind": "share", "arm": arm, "at": at, "depth": depth, "mean": number / 10, "sd": 0.01, "num": 2}
                  for at, depth in (("trained", 3), ("best", 6), ("deepest", 30))]
        return [*shares, equal(arm, "seconds", number / 10 + 0.05), equal(arm, "layer_forwards", 0.9),
                *costs(arm, number)]

    _, text = tabled(rows, "classifier_tables", arms="end-to-end,noprop-ct", settings={"images.path": "here"})
    ((end_to_end, noprop),) = tables(text)
    assert end_to_end == {
        "arm": "end-to-end", "digits: best depth": "0.100 ± 0.010 (6)", "digits: at equal seconds": "0.150 ± 0.050",
        "fashion: best depth": "0.100 ± 0.010 (6)", "fashion: at equal seconds": "0.150 ± 0.050",
        "the paper: ViT, table 1": "60.25 %", "the paper: CNN, table 6": "47.80 %"}
    assert list(noprop.values())[1:] == ["0.200 ± 0.010 (6)", "0.250 ± 0.050"] * 2 + ["-", "21.31 %"]
    assert "digits: every run spent at least 60 seconds, 5,000 layer forwards." in text


def of_task(arm, number):
    shares = [{"kind": "share", "arm": arm, "difficulty": level, "at": at, "depth": depth, "num": 2, "sd": 0.0,
               "mean": number / 10 + level / 1000}
              for level in (16, 32) for at, depth in (("trained", 8), ("best", 4), ("deepest", 64))]
    return [*shares, equal(arm, "seconds", number / 10), equal(arm, "layer_forwards", number / 10 + 0.01),
            *costs(arm, number)]


def test_a_rule_on_every_task_and_each_task_beyond_training(tabled):
    _, text = tabled(of_task, "depth_tasks", arms="full,ar", entries="prefix-sums,s5")
    (full, ar), _, words = tables(text)
    assert full == {"arm": "full", "prefix-sums: at equal seconds": "0.100 ± 0.050",
                    "s5: at equal seconds": "0.100 ± 0.050"}
    assert ar["s5: at equal seconds"] == "0.200 ± 0.050"
    assert words[1] == {"arm": "ar", "at equal layer forwards": "0.210 ± 0.050",
                        "16: best depth": "0.216 ± 0.000 (4)", "32: best depth": "0.232 ± 0.000 (4)",
                        "16: deepest": "0.216 ± 0.000 (64)", "32: deepest": "0.232 ± 0.000 (64)"}
    assert ("s5: every run spent at least 60 seconds, 5,000 layer forwards; the hardest trained difficulty is factors "
            "16." in text)
    assert "## s5\n" in text


def test_the_settings_that_differ_from_the_texts_of_the_arms_are_said(tabled):
    _, text = tabled(of_task, "puzzles_per_hour", arms="denoise,trm,full", entries="sudoku4,sudoku6", amount=100,
                     depths=[1, 24], settings={"training.num_evals": "5"})
    small, large = (next(part for part in text.split("\n\n") if part.startswith(f"{entry}: every"))
                    for entry in ("sudoku4", "sudoku6"))
    assert "single arms" not in small
    assert large.endswith("; settings of single arms: denoise optim.lr=0.002, trm optim.lr=0.001, full optim.lr=0.002.")
    assert "On the command line: `--amount 100 --depths 1,24 --training.num_evals 5`." in text
    assert "On the command line" not in tabled(of_task, "depth_tasks", arms="full", entries="s5")[1]


def test_what_was_measured_later_and_what_has_not_finished_is_said(tabled):
    def rows(arm, number):
        if arm == "ar":
            return []
        num = 2 if arm == "full" else 0
        return [equal(arm, "seconds", 0.5, num), equal(arm, "layer_forwards", 0.5), *costs(arm, number)]

    missing = {"full": "1 of 2 seeds have finished: the loss is not finite", "ar": "does not apply: for a reason"}
    _, text = tabled(rows, "depth_tasks", missing, arms="full,denoise,ar", entries="s5")
    (full, denoise, ar), _ = tables(text)
    assert [line["s5: at equal seconds"] for line in (full, denoise, ar)] == ["0.500 ± 0.050 [1]", LATER, "[2]"]
    assert "[1] 1 of 2 seeds have finished: the loss is not finite\n\n[2] does not apply: for a reason" in text
    assert "[3]" not in text


def test_a_rule_that_a_setting_refuses_is_not_trained_and_has_its_reason(order):
    entries = plan_entries(order("depth_tasks", entries="parity,nary-addition", arms="denoise,k-step,full",
                                 settings={"task.layout": "causal"}))
    for entry in entries:
        assert [arm.name for arm in entry.plan.arms] == ["k-step", "full"]
        assert "denoise.order confidence fixes the cells of a task one after another" in entry.refused["denoise"]


def test_images_that_are_made_are_measured_in_features_of_the_classifier(tabled):
    def rows(arm, number):
        made = [row for metric in ("frechet_distance", "precision", "recall") for depth in (4, 8, 16)
                for row in of_seeds("evaluation", arm, number + depth / 100, metric=metric, depth=depth, by="X")
                for row in [row | ({"at": "deepest"} if depth == 16 else {})]]
        pixels = of_seeds("figure", arm, 99, metric="frechet_distance", depth=4, by="pixels")
        return [{"kind": "arm", "arm": arm, "mean": 6 / number, "num": 1}, *made, *pixels, *costs(arm, number),
                *of_seeds("evaluation", arm, number, metric="heldout_loss"),
                *of_seeds("evaluation", arm, 99, metric="heldout_loss", by="block 0"),
                *of_seeds("evaluation", arm, 0.2, metric="frechet_distance_of_training", by="X")]

    _, text = tabled(rows, "dit_table2", arms="twin,3-blocks")
    ((_, blocks),) = tables(text)
    assert blocks == {
        "arm": "3-blocks", "layers/step": "3", "steps": "20", "seconds": "112", "held-out loss": "2.050 ± 0.071",
        "Fréchet, 4 steps": "2.090 ± 0.071", "Fréchet, 8 steps": "2.130 ± 0.071", "Fréchet, 16 steps": "2.210 ± 0.071",
        "Fréchet of training images": "0.250 ± 0.071", "precision": "2.210 ± 0.071", "recall": "2.210 ± 0.071",
        "the paper: FID": "37.20, 38.03 CIFAR-10; 11.11 ImageNet"}
    assert "not Inception FID" in text


def test_writers_have_a_line_a_depth_and_a_perplexity_a_judge(tabled):
    def rows(arm, number):
        return [row for depth in (4, 8, 16) for judge, add in (("one", 0), ("two", 2))
                for metric, start in (("judged_nats", add), ("mauve", 10), ("distinct_2", 20), ("nats_per_token", 30))
                for row in of_seeds("evaluation", arm, start + number + depth / 100, depth=depth, metric=metric,
                                    judge=judge)]

    _, text = tabled(rows, "blocks_table4")
    (lines,) = tables(text)
    assert [(line["arm"], line["depth"]) for line in lines] == [
        ("end-to-end", "4"), ("four-blocks", "4"), ("four-blocks", "8"), ("four-blocks", "16")]
    line = lines[2]
    wanted = [sum(math.exp(add + 2.08 + seed / 10) for seed in (0, 1)) / 2 for add in (0, 2)]
    found = [float(line[f"perplexity, {judge}"].split()[0]) for judge in ("one", "two")]
    assert found == pytest.approx(wanted, abs=6e-4)
    assert (line["MAUVE"], line["distinct-2"], line["held-out nats/token"]) == (
        "12.130 ± 0.071", "22.130 ± 0.071", "32.130 ± 0.071")
    assert line["the paper: MAUVE, LM1B"] == "0.71"
    assert "- end-to-end: `ar`" in text


def test_an_arm_of_more_than_one_budget_says_so(tabled):
    _, text = tabled(lambda arm, number: [], "huginn_table5")
    assert "- denoise: `denoise`, 15 times the budget" in text


def test_progress_and_the_seconds_to_a_share_with_the_seeds_that_reach_it(tabled):
    def rows(arm, number):
        reached = {"kind": "reached", "arm": arm, "budget": "seconds", "milestone": 0.95, "num_seeds": 2}
        return [*({"kind": "progress", "fraction": fraction, **{name: value for name, value in equal(
                    arm, "seconds", fraction * number / 4, num=0 if fraction == 0.1 else 2).items() if name != "kind"}}
                  for fraction in (0.1, 0.2, 0.5, 1.0)),
                reached | ({"mean": 31.25, "sd": 2.0, "num": 2, "early": True} if number == 1 else
                           {"num": 0, "early": False} if number == 2 else
                           {"mean": 45.0, "num": 1, "early": False}), *costs(arm, number)]

    _, text = tabled(rows, "puzzles_per_hour", arms="denoise,trm,full", entries="sudoku4")
    denoise, trm, full = tables(text)[0]
    assert denoise["sudoku4: after a tenth"] == LATER
    assert [line["sudoku4: half"] for line in (denoise, trm, full)] == [
        "0.125 ± 0.050", "0.250 ± 0.050", "0.375 ± 0.050"]
    assert [line["sudoku4: to 0.95"] for line in (denoise, trm, full)] == [
        "at most 31.2 ± 2", "not reached", "45 (1 of 2 seeds)"]
