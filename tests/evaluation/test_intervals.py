"""Bootstrap intervals over clusters: sequences of one document are not independent."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch

from looped.data.mixed_stream import MixedStream
from looped.data.token_windows import TokenStream, documents_of
from looped.evaluation.depth_verdicts import NATS, verdict
from looped.evaluation.metric_rows import LEAST, confidence_interval, over_clusters, summarise


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def width(ends):
    return ends[1] - ends[0]


def test_copies_of_a_value_in_its_cluster_do_not_narrow_the_interval():
    values, copies = normal(30), 5
    clusters = torch.arange(30).repeat(copies)
    assert confidence_interval(values.repeat(copies), clusters) == pytest.approx(confidence_interval(values), abs=1e-12)
    alone = confidence_interval(values.repeat(copies))
    assert width(alone) < 0.6 * width(confidence_interval(values))  # what taking copies for new values would claim


def test_the_interval_agrees_with_scipys_bootstrap_of_a_ratio_of_sums():
    sizes = torch.arange(40) % 7 + 1
    clusters = torch.arange(40).repeat_interleave(sizes)
    values = normal(40)[clusters] + 0.5 * normal(len(clusters), seed=1)
    sums = np.array([values[clusters == each].sum().item() for each in range(40)])
    theirs = scipy.stats.bootstrap((sums, sizes.numpy().astype(float)), paired=True, vectorized=True, n_resamples=20_000,
                                   method="percentile", rng=0, statistic=lambda s, n, axis: s.sum(axis) / n.sum(axis))
    ours = confidence_interval(values, clusters, num_resamples=20_000)
    ends = theirs.confidence_interval
    assert ours == pytest.approx((ends.low, ends.high), abs=0.03 * width(ends))


def test_intervals_over_clusters_cover_the_mean_and_those_over_values_do_not():
    """300 texts of 30 documents of 1 to 7 sequences, whose documents differ as much as their sequences do."""
    clusters = torch.arange(30).repeat_interleave(torch.arange(30) % 7 + 1)
    held = {True: 0, False: 0}
    for seed in range(300):
        values = normal(30, seed=seed)[clusters] + normal(len(clusters), seed=seed + 1_000)
        for clustered in held:
            low, high = confidence_interval(values, clusters if clustered else None, num_resamples=400)
            held[clustered] += low < 0 < high
    assert held[True] / 300 > 0.88  # 0.95 but for the few documents
    assert held[False] / 300 < 0.8


def test_fewer_clusters_than_tell_a_sign_leave_the_interval_over_values():
    values = normal(60)
    few, enough = torch.arange(60) % (LEAST - 1), torch.arange(60) % LEAST
    assert (over_clusters(few), over_clusters(enough), over_clusters(None)) == (False, True, False)
    assert confidence_interval(values, few) == confidence_interval(values)
    assert confidence_interval(values, enough) != confidence_interval(values)


def test_a_row_has_the_mean_of_its_values_and_their_number_whatever_the_clusters():
    values, clusters = normal(40) + 3, torch.arange(40) // 4
    row, plain = summarise("nats", values, clusters=clusters), summarise("nats", values)
    assert (row.mean, row.n) == (plain.mean, plain.n) == (values.mean().item(), 40)
    assert row.ends == confidence_interval(values, clusters)


def test_a_verdict_takes_a_fall_in_one_document_for_noise():
    """Half of the sequences are of one document, which loses at depth; the others of 20 others, which do not."""
    clusters = torch.cat([torch.zeros(40, dtype=torch.long), torch.arange(1, 21).repeat(2)])
    shallow = 3 + 0.01 * normal(80)
    deep = shallow + 0.01 * normal(80, seed=1) + 0.3 * (clusters == 0)
    assert verdict({1: shallow, 2: deep}, NATS).name == "overthinks"
    assert verdict({1: shallow, 2: deep}, NATS, clusters=clusters).name == "settles"


def test_windows_are_numbered_by_the_document_in_which_they_begin():
    tokens = np.array([5, 6, 7, 0, 8, 9, 5, 6, 7, 8, 0, 5, 0, 6, 7, 8, 0], dtype=np.uint16)
    stream = TokenStream("text", tokens, end_of_text=0)
    places = stream.places(8, 2)
    assert places["start"] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert documents_of(places).tolist() == [0, 0, 1, 1, 1, 1, 2, 3]


def test_documents_of_two_sources_of_a_mixture_are_different_ones():
    one, other = (TokenStream(name, np.array([5, 6, 7, 0, 8, 9, 5, 0, 6]), end_of_text=0) for name in "ab")
    mixed = MixedStream("text", {"a": one, "b": other}, {"a": Fraction(1, 2), "b": Fraction(1, 2)})
    places = mixed.places(8, 2)
    found = documents_of(places)
    assert len(set(found.tolist())) == 4
    assert all((places["source"][i] == places["source"][j]) or found[i] != found[j] for i in range(8) for j in range(8))
