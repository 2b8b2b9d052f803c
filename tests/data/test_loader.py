"""The order of windows is a function of (seed, step): any slice is the whole's, and every token is a target once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looped.data.token_windows import TokenStream
from looped.errors import UserError


def counting(size):
    """A stream whose tokens are their own places."""
    return TokenStream("train", np.arange(size, dtype=np.uint16), end_of_text=0)


sizes = st.integers(20, 400)
lengths = st.integers(2, 10)
seeds = st.integers(0, 2**64)


@given(sizes, lengths, st.integers(1, 50), st.integers(0, 10_000), seeds, st.data())
@settings(max_examples=200)
def test_rows_of_a_batch_are_the_slice_of_the_whole_batch(size, length, batch_size, step, seed, data):
    stream = counting(size)
    start = data.draw(st.integers(0, batch_size))
    rows = range(start, data.draw(st.integers(start, batch_size)))
    whole = stream.batch(step, batch_size=batch_size, length=length, seed=seed)
    part = stream.batch(step, batch_size=batch_size, length=length, seed=seed, rows=rows)
    assert torch.equal(part, whole[rows.start : rows.stop])
    assert whole.shape == (batch_size, length + 1)
    assert whole.dtype == torch.int64


@given(sizes, lengths, st.integers(1, 9), seeds)
@settings(max_examples=100, deadline=None)
def test_every_token_is_a_target_once_an_epoch_whatever_the_batch_size(size, length, batch_size, seed):
    stream = counting(size)
    count = stream.windows(length)
    steps = -(-3 * count // batch_size)
    items = torch.cat([stream.batch(step, batch_size=batch_size, length=length, seed=seed) for step in range(steps)])
    for epoch in range(3):
        targets = items[epoch * count : (epoch + 1) * count, 1:].flatten().sort().values
        assert targets.tolist() == list(range(1, count * length + 1))
    assert size - 1 - count * length < length  # what is left over is less than a window


def test_windows_are_neighbouring_tokens():
    batch = counting(100).batch(3, batch_size=8, length=5, seed=1)
    assert torch.equal(batch, batch[:, :1] + torch.arange(6))


def test_the_order_does_not_depend_on_what_was_asked_before():
    late = counting(300).batch(17, batch_size=4, length=8, seed=5)
    stream = counting(300)
    for step in range(18):
        again = stream.batch(step, batch_size=4, length=8, seed=5)
    assert torch.equal(again, late)


def test_batch_size_and_step_count_items_of_one_endless_order():
    stream = counting(300)
    large = [stream.batch(step, batch_size=12, length=8, seed=5) for step in range(5)]
    small = [stream.batch(step, batch_size=4, length=8, seed=5) for step in range(15)]
    assert torch.equal(torch.cat(large), torch.cat(small))


def test_seeds_and_epochs_give_other_orders():
    stream = counting(1000)
    count = stream.windows(8)
    orders = [stream.batch(epoch, batch_size=count, length=8, seed=seed)[:, 0].tolist()
              for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_the_order_is_the_recorded_one():
    first = counting(100).batch(0, batch_size=6, length=8, seed=0)[:, 0]
    assert (first // 8).tolist() == [0, 2, 11, 9, 1, 8]


def test_tokens_of_two_and_of_four_bytes_are_read():
    for dtype, token in (("<u2", 65_535), ("<u4", 4_000_000_000)):
        stream = TokenStream("train", np.full(20, token, dtype=dtype), end_of_text=0)
        assert stream.batch(0, batch_size=1, length=4, seed=0).unique().tolist() == [token]


@given(sizes, lengths, st.data())
def test_sequences_are_distinct_evenly_spaced_windows(size, length, data):
    stream = counting(size)
    count = stream.windows(length)
    num = data.draw(st.integers(1, count))
    sequences = stream.sequences(num, length)
    assert sequences.shape == (num, length + 1)
    starts = sequences[:, 0]
    assert torch.equal(sequences, starts[:, None] + torch.arange(length + 1))
    gaps = (starts[1:] - starts[:-1]) // length
    assert num == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_more_sequences_than_there_are_gives_all_and_says_so():
    with pytest.warns(UserWarning, match="14 sequences are requested, but the train text has 12"):
        sequences = counting(100).sequences(14, 8)
    assert torch.equal(sequences, counting(100).sequences(12, 8))


def test_a_text_shorter_than_a_window_names_both_sizes():
    with pytest.raises(UserError, match=r"data\.length 8 needs 9 tokens, but the train text has 8; lower data\.length"):
        counting(8).batch(0, batch_size=1, length=8, seed=0)
    assert counting(9).windows(8) == 1


def test_rows_are_described_by_offsets_and_by_the_documents_they_touch():
    tokens = np.array([5, 5, 5, 0, 6, 0, 7, 7, 7, 7, 7, 7, 0], dtype=np.uint16)  # a: 0-3, b: 4-5, c: 6-12
    stream = TokenStream("train", tokens, end_of_text=0, documents=("a", "b", "c"))
    batch = stream.batch(2, batch_size=3, length=4, seed=0)
    lines = stream.describe(2, batch_size=3, length=4, seed=0)
    words = {0: "train tokens 0-4 (a, b)", 4: "train tokens 4-8 (b, c)", 8: "train tokens 8-12 (c)"}
    assert [line.split(": ")[0] for line in lines] == ["row 0", "row 1", "row 2"]
    for row, line in zip(batch, lines, strict=True):
        start = next(start for start in words if tokens[start : start + 5].tolist() == row.tolist())
        assert line.endswith(words[start])
    assert stream.describe(2, batch_size=3, length=4, seed=0, rows=range(1, 3)) == lines[1:]
