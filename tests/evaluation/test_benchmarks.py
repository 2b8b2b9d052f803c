"""Figures of benchmark tasks: read as functions of a mean over documents, and paired by question."""

import math

import pytest
import torch

from looped.evaluation.benchmarks import Figure, curves_of, reading_of, told_once
from looped.evaluation.intervals import confidence_interval

RIGHT = [1.0, 0.0, 1, 1.0, True, 0.0, 1.0, 1.0]
LENGTHS = [(-30.0, 10), (-8.0, 4), (-40.0, 9), (-55.0, 20)]


def figure(metric, value, scores, depth=1, *, higher=True, chance=None, **where):
    return Figure(metric, value, scores, higher, chance, {"task": "quiz", "depth": depth, "num_fewshot": 0, **where})


@pytest.mark.parametrize(("value", "scores", "unit"), [
    (0.75, RIGHT, None), (math.exp(2.5), [-2.0, -3.0], "bits/answer"),
    (math.exp(133 / 43), LENGTHS, "bits/unit"), (133 / 43 / math.log(2), LENGTHS, "bits/unit")])
def test_a_figure_is_a_function_of_the_mean_of_its_values(value, scores, unit):
    reading, values = reading_of(value, scores)
    assert reading.unit == unit
    assert reading.shown(values.mean().item()) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("scores", [[("a", "b")], [0.5, "x"], [(1, 2, 3)], [-1e6, -1e6], [(-1.0, 0)]])
def test_any_other_figure_has_no_values_and_no_interval(scores):
    assert reading_of(0.4, scores) is None
    row, lines = figure("own", 0.4, scores).lines()
    assert (row.mean, row.ci_low, row.n, lines) == (0.4, None, len(scores), [])


def test_an_interval_is_that_of_the_values_in_the_units_of_the_figure():
    row, (line,) = figure("word_perplexity", math.exp(133 / 43), LENGTHS, higher=False).lines()
    low, high = confidence_interval(torch.tensor(line["values"]))
    assert (row.ci_low, row.ci_high) == pytest.approx((2**low, 2**high))
    assert row.ci_low < row.mean < row.ci_high
    assert (line["unit"], line["higher_is_better"]) == ("bits/word", False)


def lines_of(*figures):
    made = [each.lines() for each in figures]
    return [row.as_dict() for row, _ in made], [line for _, lines in made for line in lines]


def answers(share, num=200):
    return [float(i < share * num) for i in range(num)]


def test_a_verdict_is_paired_by_question_and_knows_guessing():
    rows, examples = lines_of(*(figure("acc", share, answers(share), depth, chance=0.25)
                                for depth, share in ((1, 0.3), (4, 0.6), (16, 0.5))))
    (curve,) = curves_of(rows, examples)
    found = curve.verdict(4)
    assert found.name == "overthinks"
    assert "falls from 0.60 at 4 to 0.50 acc at 16 steps" in found.sentence
    assert "paired over 200 questions" in found.sentence
    rows, examples = lines_of(*(figure("acc", 0.25, answers(0.25), depth, chance=0.25) for depth in (1, 4)))
    assert curves_of(rows, examples)[0].verdict(4).name == "never"


def test_a_perplexity_that_falls_improves():
    scores = {depth: [(-n * nats - i % 3, n) for i, n in enumerate([20, 30, 25] * 4)]
              for depth, nats in ((1, 4.0), (8, 3.0))}
    rows, examples = lines_of(*(figure("byte_perplexity", math.exp(-sum(a for a, _ in each) / sum(n for _, n in each)),
                                       each, depth, higher=False) for depth, each in scores.items()))
    assert curves_of(rows, examples)[0].verdict(1).name == "improves"


def test_metrics_with_the_same_values_are_told_once_and_others_apart():
    bits = -sum(a for a, _ in LENGTHS) / sum(n for _, n in LENGTHS)
    rows, examples = lines_of(figure("acc", 0.75, RIGHT), figure("acc_norm", 0.75, RIGHT), figure("f1", 0.1, ["x"]),
                              figure("acc", 0.25, answers(0.25), num_fewshot=5),
                              figure("bits_per_byte", bits / math.log(2), LENGTHS),
                              figure("byte_perplexity", math.exp(bits), LENGTHS))
    labels = [curve.label for curve in told_once(curves_of(rows, examples))]
    assert labels == ["quiz, 0-shot (acc, acc_norm)", "quiz, 0-shot (f1)", "quiz, 5-shot (acc)",
                      "quiz, 0-shot (bits_per_byte, byte_perplexity)"]


def test_one_depth_has_no_verdict():
    rows, examples = lines_of(figure("acc", 0.75, RIGHT))
    assert curves_of(rows, examples)[0].verdict(1) is None
