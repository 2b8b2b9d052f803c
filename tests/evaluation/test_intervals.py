"""Bootstrap intervals over clusters: sequences of one document are not independent."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch

from looped import UserError
from looped.data.mixed_stream import MixedStream
from looped.data.token_windows import TokenStream
from looped.evaluation.depth_verdicts import NATS, honestly_best, verdict
from looped.evaluation.intervals import (
    LEAST,
    Clusters,
    check_clusters,
    confidence_interval,
    documents_of,
    student_interval,
    student_point,
)
from looped.evaluation.metric_rows import summarise

UNEQUAL = torch.tensor([50, 6, 6, 6, *[4] * 11, *[3] * 4, 2, 2])
"""Sequences of 21 documents, 128 in all, as unequal as those of the default corpus."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def width(ends):
    return ends[1] - ends[0]


def of(labels, strata=None):
    return Clusters(labels, torch.zeros_like(labels) if strata is None else strata)


def test_copies_of_a_value_in_its_cluster_do_not_narrow_the_interval():
    values, copies = normal(30), 5
    once, often = of(torch.arange(30)), of(torch.arange(30).repeat(copies))
    assert confidence_interval(values.repeat(copies), often) == pytest.approx(confidence_interval(values, once))
    alone = confidence_interval(values.repeat(copies))
    assert width(alone) < 0.6 * width(confidence_interval(values))  # what taking copies for new values would claim


def test_the_interval_is_scipys_bootstrap_of_a_ratio_of_sums_widened_as_students_t():
    sizes = torch.arange(40) % 7 + 1
    labels = torch.arange(40).repeat_interleave(sizes)
    values = normal(40)[labels] + 0.5 * normal(len(labels), seed=1)
    sums = np.array([values[labels == each].sum().item() for each in range(40)])
    level = scipy.stats.norm.cdf(-scipy.stats.t.ppf(0.975, 39))
    theirs = scipy.stats.bootstrap((sums, sizes.double().numpy()), paired=True, vectorized=True, n_resamples=20_000,
                                   method="percentile", confidence_level=1 - 2 * level, rng=0,
                                   statistic=lambda s, n, axis: s.sum(axis) / n.sum(axis)).confidence_interval
    ours = confidence_interval(values, of(labels), num_resamples=20_000)
    mean, wider = values.mean().item(), math.sqrt(40 / 39)
    expected = [mean + wider * (end - mean) for end in (theirs.low, theirs.high)]
    assert ours == pytest.approx(expected, abs=0.03 * width(expected))


@pytest.mark.parametrize("free", [1, 5, 15, 16, 20, 40, 119, 1000])
def test_the_points_of_students_t_are_scipys(free):
    assert student_point(free) == pytest.approx(scipy.stats.t.ppf(0.975, free), abs=1e-3)


def test_the_interval_over_seeds_is_scipys():
    values = [2.1, 2.4, 2.2, 2.8]
    ends = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert student_interval(values) == pytest.approx((ends.low, ends.high), rel=1e-3)


@pytest.mark.parametrize(("sizes", "least"), [(UNEQUAL, 0.9), (torch.arange(30) % 7 + 1, 0.92),
                                              (torch.full((6,), 10), 0.88)])
def test_intervals_over_clusters_cover_the_mean_and_those_over_values_do_not(sizes, least):
    """300 texts whose documents differ as much as their sequences do."""
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)
    held = {True: 0, False: 0}
    for seed in range(300):
        values = normal(len(sizes), seed=seed)[labels] + normal(len(labels), seed=seed + 1_000)
        for clustered in held:
            low, high = confidence_interval(values, of(labels) if clustered else None, num_resamples=400)
            held[clustered] += low < 0 < high
    assert held[True] / 300 > least
    assert held[False] / 300 < 0.8


def test_fewer_clusters_than_tell_a_sign_leave_the_interval_over_values():
    values = normal(60)
    few, enough = of(torch.arange(60) % (LEAST - 1)), of(torch.arange(60) % LEAST)
    assert (few.suffice, enough.suffice) == (False, True)
    assert confidence_interval(values, few) == confidence_interval(values)
    assert confidence_interval(values, enough) != confidence_interval(values)


def test_the_shares_of_a_mixtures_sources_do_not_vary_between_resamples():
    """Two sources of which every document has the mean of its source but for little: all of the width is within."""
    labels, strata = torch.arange(40), torch.arange(40) // 20
    values = 3.0 * strata + 0.01 * normal(40)
    within = confidence_interval(values, of(labels, strata))
    assert width(within) < 0.01
    assert width(confidence_interval(values, of(labels))) > 0.5  # as if the sources' shares were chance
    part = of(labels, strata)[strata == 1]
    assert (len(part), part.num, part.suffice) == (20, 20, True)


@pytest.mark.parametrize(("sizes", "second", "least"), [([10] * 6 + [1] * 60, 6, 0.91), ([10] * 6 + [30] * 2, 6, 0.86),
                                                        ([5] * 24, 12, 0.91)])
def test_intervals_over_two_sources_cover_the_mean_even_if_one_has_few_documents(sizes, second, least):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    clusters = of(labels, (labels >= second).long())
    held = 0
    for seed in range(300):
        values = normal(len(sizes), seed=seed)[labels] + normal(len(labels), seed=seed + 1_000)
        low, high = confidence_interval(values, clusters, num_resamples=400)
        held += low < 0 < high
    assert held / 300 > least


def test_a_source_of_one_document_leaves_the_interval_over_values():
    labels = torch.cat([torch.arange(40) // 2, torch.full((20,), 100)])
    values, one = normal(60), of(labels, (labels == 100).long())
    assert not one.suffice
    assert confidence_interval(values, one) == confidence_interval(values)


def test_values_that_are_all_equal_have_an_interval_of_no_width():
    labels = torch.arange(40) // 4
    for strata in (torch.zeros_like(labels), labels // 5):
        assert confidence_interval(torch.full((40,), 2.5), of(labels, strata)) == pytest.approx((2.5, 2.5))


@pytest.mark.usefixtures("unchecked")
def test_labels_in_two_strata_and_strata_of_another_length_are_refused():
    with pytest.raises(UserError, match="lies in two strata"):
        of(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    with pytest.raises(UserError, match="3 labels and 2 strata"):
        of(torch.arange(3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(UserError, match="labels of 4 sequences, but there are 5"):
        confidence_interval(normal(5), of(torch.arange(4)))


def test_a_row_has_the_mean_of_its_values_and_the_number_of_clusters():
    values, clusters = normal(40) + 3, of(torch.arange(40) // 4)
    row, plain = summarise("nats", values, clusters=clusters), summarise("nats", values)
    assert (row.mean, row.n, row.clusters) == (plain.mean, plain.n, 10) == (values.mean().item(), 40, 10)
    assert plain.clusters is None
    assert summarise("nats", values, clusters=of(torch.arange(40) // 20)).clusters is None
    assert row.ends == confidence_interval(values, clusters)


def test_a_verdict_takes_a_fall_in_one_document_for_noise():
    """Half of the sequences are of one document, which loses at depth; the others of 20 others, which do not."""
    labels = torch.cat([torch.zeros(40, dtype=torch.long), torch.arange(1, 21).repeat(2)])
    shallow = 3 + 0.01 * normal(80)
    deep = shallow + 0.01 * normal(80, seed=1) + 0.3 * (labels == 0)
    assert verdict({1: shallow, 2: deep}, NATS).name == "overthinks"
    assert verdict({1: shallow, 2: deep}, NATS, clusters=of(labels)).name == "settles"


def test_the_best_depth_is_chosen_on_other_documents():
    """Depths that differ by the noise of documents alone: chosen on sequences of the same documents, the best one of
    eight is better than the mean of all; chosen on other documents it is not."""
    labels = torch.arange(12).repeat_interleave(8)
    clusters = of(labels)
    halves = clusters.halves()
    assert halves.sum() == 48
    assert all(len(halves[labels == each].unique()) == 1 for each in range(12))
    sources = of(torch.cat([torch.arange(20), torch.arange(20, 24).repeat_interleave(5)]), torch.arange(40) // 20)
    assert sources.halves()[:20].sum() == sources.halves()[20:].sum() == 10
    gains = {True: 0.0, False: 0.0}
    for seed in range(200):
        noise = normal(8, 12, seed=seed)[:, labels]
        for clustered in gains:
            best = honestly_best(dict(enumerate(noise)), clusters if clustered else None)
            gains[clustered] += best.mean().item() / 200
    assert abs(gains[True]) < 0.05
    assert gains[False] > 0.3


def test_windows_are_numbered_by_the_document_in_which_they_begin():
    tokens = np.array([5, 6, 7, 0, 8, 9, 5, 6, 7, 8, 0, 5, 0, 6, 7, 8, 0], dtype=np.uint16)
    places = TokenStream("text", tokens, end_of_text=0).places(8, 2)
    assert places["start"] == [0, 2, 4, 6, 8, 10, 12, 14]
    found = documents_of(places)
    assert found.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 3]
    assert found.strata.tolist() == [0] * 8
    assert found.counted == "4 documents"


def test_documents_of_two_sources_of_a_mixture_are_different_ones():
    one, other = (TokenStream(name, np.array([5, 6, 7, 0, 8, 9, 5, 0, 6]), end_of_text=0) for name in "ab")
    mixed = MixedStream("text", {"a": one, "b": other}, {"a": Fraction(1, 2), "b": Fraction(1, 2)})
    places = mixed.places(8, 2)
    found = documents_of(places)
    assert found.num == 4
    assert ["ab"[stratum] for stratum in found.strata] in (places["source"], ["ba"["ab".index(s)] for s in
                                                                              places["source"]])


def test_labels_of_another_number_of_sequences_are_refused_before_anything_is_measured():
    check_clusters(None, 5)
    check_clusters(of(torch.arange(5)), 5)
    with pytest.raises(UserError, match="labels of 4 sequences, but there are 5"):
        check_clusters(of(torch.arange(4)), 5)
    with pytest.raises(UserError, match="documents_of"):
        check_clusters(torch.arange(5), 5)
