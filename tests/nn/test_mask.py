"""Masks of one's own, combined, changed after use and given by mistake: right in every backend, or one sentence."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from attention_oracle import formula, qkv

from looped.errors import UserError
from looped.nn.attention import attention
from looped.nn.backends import flex_block_mask, run_flex
from looped.nn.layers import Attention, Rotary
from looped.nn.mask_base import Mask, Table
from looped.nn.masks import Causal, Full, Near, Packed, Padded, SameDocument, SlidingWindow
from looped.nn.recurrence import RecurrentDepth
from looped.nn.rows import Rows

B, L = 2, 6
FIRST = torch.tensor([4, 2])


class FirstOf(Mask):
    """Everybody sees the first few rows, as many as its sequence has: a mask as the docstring tells to write one."""

    def __init__(self, lengths):
        self.lengths = lengths

    def allow(self, q, k, b=0):
        return k < self.lengths[b]


class Before(Mask):
    """A mask without a say in the batch, whose width may be changed."""

    def __init__(self, width):
        self.width = width

    def allow(self, q, k, b=0):
        return (k <= q) & (q - k < self.width)


def first_of(lengths, queries=L):
    return torch.stack([(torch.arange(L) < n).expand(1, queries, L) for n in lengths])


def before(width):
    q, k = torch.arange(L).unsqueeze(1), torch.arange(L)
    return ((k <= q) & (q - k < width)).view(1, 1, L, L)


@pytest.mark.parametrize("queries", [L, 2])
@pytest.mark.parametrize("run", [attention, run_flex], ids=["attention", "flex"])
def test_each_row_of_a_batch_has_its_own_rows_of_a_mask_of_ones_own(run, queries, unchecked):
    q, k, v = (t.detach() for t in qkv(queries=queries, dtype=torch.float32))
    ours = run(q, k, v, FirstOf(FIRST))
    torch.testing.assert_close(ours, formula(q, k, v, first_of(FIRST, queries)))
    assert not torch.allclose(ours, formula(q, k, v, first_of([4, 4], queries)))  # positive control: it says so


def test_a_mask_that_says_nothing_of_rows_is_one_for_all():
    assert Before(2).dense(B, L, L).shape[0] == 1
    assert FirstOf(FIRST).dense(B, L, L).shape[0] == B
    assert flex_block_mask(Before(2), B, L, L, torch.device("cpu")).shape[0] == 1


def test_a_mask_with_rows_to_spare_serves_smaller_batches():
    mask, (q, k, v) = FirstOf(torch.tensor([4, 2, 5])), qkv(batch=3)
    for size in (3, 2):
        same = formula(q[:size], k[:size], v[:size], first_of(mask.lengths[:size]))
        torch.testing.assert_close(attention(q[:size], k[:size], v[:size], mask), same)


@pytest.mark.parametrize("change", [
    lambda mask: setattr(mask, "lengths", torch.tensor([1, 5])), lambda mask: mask.lengths.copy_(torch.tensor([1, 5])),
], ids=["set", "in place"])
@pytest.mark.parametrize("wrap", [lambda mask: mask, lambda mask: mask & Full(), lambda mask: Full() & (mask | mask)],
                         ids=["alone", "combined", "nested"])
def test_a_changed_mask_changes_its_form(wrap, change):
    inner, (q, k, v) = FirstOf(FIRST.clone()), qkv()
    mask = wrap(inner)
    attention(q, k, v, mask)
    change(inner)
    torch.testing.assert_close(attention(q, k, v, mask), formula(q, k, v, first_of([1, 5])))


def test_a_built_in_mask_changed_in_place_changes_its_form():
    mask, (q, k, v) = Padded(torch.tensor([4, 6])), qkv()
    attention(q, k, v, mask)
    mask.lengths[0] = 1
    torch.testing.assert_close(attention(q, k, v, mask), formula(q, k, v, Padded([1, 6]).dense(B, L, L)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [FirstOf, lambda lengths: Padded(lengths, causal=False)], ids=["own", "Padded"])
def test_a_tensor_changed_in_place_changes_the_form_where_changes_are_not_counted(make, mode):
    with mode():
        lengths, q = torch.tensor([2, 3]), torch.randn(2, 6, 1, 4)
        assert lengths.is_inference() == (mode is torch.inference_mode)
        mask = make(lengths)
        first = attention(q, q, q, mask)
        assert torch.equal(attention(q, q, q, mask), first)
        lengths += 1
        found = attention(q, q, q, mask)
        assert not torch.equal(found, first)
        assert torch.equal(found, attention(q, q, q, make(lengths.clone())))


@pytest.mark.parametrize("make", [
    lambda: Causal() & SlidingWindow(3), lambda: Packed([[2, 4], [3, 3]]), lambda: Padded([4, 0]),
    lambda: FirstOf(FIRST), lambda: Table(torch.eye(L, dtype=torch.bool))],
    ids=["both", "Packed", "Padded", "own", "Table"])
@pytest.mark.parametrize("inside", [True, False], ids=["made inside", "made outside"])
def test_a_mask_first_used_under_inference_mode_trains(make, inside):
    mask, (q, k, v) = make(), qkv()
    with torch.inference_mode():
        mask = make() if inside else mask
        attention(q.detach().clone(), k, v, mask)
    out = attention(q, k, v, mask)
    torch.testing.assert_close(out, formula(q, k, v, mask.dense(B, L, L)))
    assert torch.autograd.grad(out.sum(), q)[0].abs().sum() > 0


def test_lists_that_a_mask_holds_may_change_too():
    class OfList(FirstOf):
        def allow(self, q, k, b=0):
            return k < torch.tensor(self.lengths)[b]

    mask, (q, k, v) = OfList([4, 2]), qkv()
    attention(q, k, v, mask)
    mask.lengths[0] = 1
    torch.testing.assert_close(attention(q, k, v, mask), formula(q, k, v, first_of([1, 2])))


def test_an_object_that_a_mask_holds_may_change_too():
    class OfObject(Mask):
        def __init__(self, own):
            self.own = own

        def allow(self, q, k, b=0):
            return k < self.own.lengths[b]

    own, (q, k, v) = SimpleNamespace(lengths=torch.tensor([4, 2])), qkv()
    mask = OfObject(own) & Full()
    attention(q, k, v, mask)
    own.lengths = torch.tensor([1, 5])
    torch.testing.assert_close(attention(q, k, v, mask), formula(q, k, v, first_of([1, 5])))


def test_an_unchanged_mask_is_brought_to_its_form_once():
    made, mask, (q, k, v) = [], FirstOf(FIRST), qkv()
    mask.dense = lambda *sizes: made.append(1) or FirstOf.dense(mask, *sizes)
    for _ in range(3):
        attention(q, k, v, mask)
    assert len(made) == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))],
                         ids=["copy", "deepcopy", "pickle"])
def test_a_copy_of_a_used_mask_is_a_mask_of_its_own(copied):
    mask, (q, k, v) = FirstOf(FIRST), qkv()
    attention(q, k, v, mask)
    run_flex(q.detach(), k.detach(), v.detach(), mask)
    other = copied(mask)
    other.lengths = torch.tensor([1, 5])
    torch.testing.assert_close(attention(q, k, v, other), formula(q, k, v, first_of([1, 5])))
    torch.testing.assert_close(attention(q, k, v, mask), formula(q, k, v, first_of(FIRST)))


@pytest.mark.parametrize("shape", [(L, L), (B, L, L), (B, 1, L, L)])
def test_a_bool_tensor_is_the_mask_that_torch_takes(shape):
    allowed, (q, k, v) = torch.rand(shape) < 0.5, qkv()
    allowed = allowed | torch.eye(L, dtype=torch.bool)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=allowed if len(shape) != 3 else allowed.unsqueeze(1))
    torch.testing.assert_close(attention(q, k, v, allowed), theirs.transpose(1, 2))


PLACES = torch.arange(L).view(1, L, 1)
PAIRS = [(Padded([4, 6]), Near(PLACES, 1)), (Packed(((3, 2, 1), (1, 5))), SlidingWindow(2)), (FirstOf(FIRST), Causal()),
         (Padded([5]), FirstOf(FIRST)), (Full(), Causal()), (Table(first_of(FIRST)), Causal())]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda mask: type(mask).__name__)
def test_combined_masks_are_the_combined_tensors(first, second):
    a, b = (mask.dense(B, L, L) for mask in (first, second))
    assert torch.equal((first & second).dense(B, L, L).expand(B, -1, -1, -1), (a & b).expand(B, -1, -1, -1))
    assert torch.equal((first | second).dense(B, L, L).expand(B, -1, -1, -1), (a | b).expand(B, -1, -1, -1))
    assert not torch.equal((a & b).expand(B, -1, -1, -1), (a | b).expand(B, -1, -1, -1))
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v, first & second), formula(q, k, v, a & b))


@pytest.mark.parametrize("mask", [FirstOf(torch.tensor([4, 2, 5])), FirstOf(torch.tensor([4, 2, 5])) & Causal(),
                                  Padded([5]) | FirstOf(torch.tensor([4, 2, 5])), Padded([3, 6, 1]) & SlidingWindow(2)],
                         ids=lambda mask: type(mask).__name__)
def test_some_rows_of_a_mask_of_ones_own_are_that_part_of_the_whole(mask):
    rows = torch.tensor([2, 0])
    assert torch.equal(mask.of_rows(rows).dense(2, L, L), mask.dense(3, L, L)[rows])


def test_depth_by_sequence_takes_each_sequences_own_rows_of_a_mask():
    class Core(torch.nn.Module):
        def forward(self, state, e, cond, rows):
            return attention(*(t.unsqueeze(2) for t in (state, e, e)), rows.mask).squeeze(2)

    mask, e = FirstOf(torch.tensor([4, 2, 5])), torch.randn(3, L, 4)
    loop, depths = RecurrentDepth(Core(), state_init="embedding"), torch.tensor([1, 3, 2])
    ours = loop.unroll(e, no_grad=0, grad=depths, rows=lambda index, sequences: Rows(mask=mask).of(sequences))
    for row, depth in enumerate(depths.tolist()):
        alone = Rows(mask=FirstOf(mask.lengths[row : row + 1]))
        torch.testing.assert_close(ours[row : row + 1], loop.unroll(e[row : row + 1], no_grad=0, grad=depth,
                                                                    rows=lambda *_, alone=alone: alone))


def test_a_sliding_window_is_its_picture_and_has_torchs_shape():
    band = torch.ones(L, L).tril().bool() & torch.ones(L, L).triu(-1).bool()
    assert torch.equal(SlidingWindow(2).dense(1, L, L)[0, 0], band)
    picture = SlidingWindow.__doc__.split("```")[1].split()
    assert ["#" if seen else "." for seen in SlidingWindow(2).dense(1, 4, 4).flatten()] == picture


@pytest.mark.parametrize("shape", [(L, L), (B, L, L), (B, 1, L, L)])
@pytest.mark.parametrize("queries", [L, 2])
def test_a_bool_tensor_works_as_a_table(shape, queries):
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    q, k, v = qkv(queries=queries)
    theirs = formula(q, k, v, allowed.view(-1, 1, L, L)[:, :, L - queries :])
    torch.testing.assert_close(attention(q, k, v, Table(allowed)), theirs)


@pytest.mark.parametrize("rows", [[[1, 1, 1], [1, 0, 0]], [[0, 1, 1], [0, 0, 1]], [[1, 1, 1], [1, 1, 1]],
                                  [[0, 0, 0], [1, 1, 0]], [[0, 0, 0], [0, 1, 1]]])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8, torch.bfloat16], ids=str)
def test_transformers_attention_mask_becomes_the_padding_it_describes(rows, causal, dtype, unchecked):
    real = torch.tensor(rows).bool()
    mask = Padded.of_attention_mask(real.to(dtype), causal=causal)
    wanted = real.unsqueeze(2) & real.unsqueeze(1) & (torch.ones(3, 3).tril().bool() | (not causal))
    assert torch.equal(mask.dense(2, 3, 3)[:, 0], wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_small_integers_do_not_wrap_around(dtype, unchecked):
    lengths = torch.tensor([100, 120])
    wide, small = (Padded(n, side="left", causal=False, width=300) for n in (lengths, lengths.to(dtype)))
    assert torch.equal(small.dense(2, 300, 300), wide.dense(2, 300, 300))
    assert small.dense(2, 300, 300)[0, 0].any(0).sum() == 100
    places = torch.tensor([0, 100, 127, 1]).view(1, 4, 1)
    assert torch.equal(Near(places.to(dtype), 1).dense(1, 4, 4), Near(places, 1).dense(1, 4, 4))
    with pytest.raises(UserError, match="returns to an earlier document"):
        Packed(torch.tensor([[1, 0, 1]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_lengths_that_change_in_place_are_those_of_the_mask(dtype, unchecked):
    mask = Padded(lengths := torch.tensor([6, 4], dtype=dtype))
    lengths[0] = 2
    assert mask.dense(2, 6, 6)[0, 0].any(0).tolist() == [True, True, False, False, False, False]


class Scalar(Mask):
    def allow(self, q, k, b=0):
        return k < [4, 2][int(b)]


class Additive(Mask):
    def allow(self, q, k, b=0):
        return torch.where(k <= q, 0.0, -torch.inf)


class ForTwo(Mask):
    def allow(self, q, k, b=0):
        return (k < FIRST.view(-1, 1, 1, 1)) & (q >= 0)


class Silent(Mask):
    pass


class Failing(Mask):
    def allow(self, q, k, b=0):
        raise ValueError


def given(mask, batch=B, **sizes):
    return lambda: attention(*qkv(batch=batch, **sizes), mask)


@pytest.mark.parametrize(("make", "why"), [
    (given(None), r"got None: Full\(\) lets every row attend"),
    (given(torch.ones(L, L)[0].bool()), r"Table takes a bool tensor \(queries, keys\)"),
    (given(torch.ones(B, L)), r"Padded.of_attention_mask\(tensor, causal"),
    (given(FirstOf(FIRST), batch=3), "FirstOf.allow failed for 3 sequences"),
    (given(Scalar()), "Scalar.allow failed for 2 sequences at once"),
    (given(Silent()), r"^Silent does not say who attends to whom; define its allow\(q, k, b=0\)"),
    (given(Failing()), r"Failing.allow failed for 2 sequences at once \(ValueError\)"),
    (given(Additive()), r"a float32 tensor of shape .* must return true or false"),
    (given(ForTwo(), batch=3), "ForTwo.allow returned a bool tensor .* for 3 sequences"),
    (given(Table(torch.ones(2, L).bool())), "the table has 2 queries, not 6"),
    (given(Causal(), keys=2), r"at most 2; the layout is \(batch, length, heads, dim\)"),
    (lambda: Padded(torch.ones(B, L, dtype=torch.long)), r"Padded.of_attention_mask\(mask\)"),
    (lambda: Padded(torch.tensor([1.5, 2.0])), "whole numbers .*float32"),
    (lambda: Padded([]), "whole numbers"),
    (lambda: Packed(torch.zeros(4)), "documents must be whole numbers"),
    (lambda: Padded.of_attention_mask(torch.tensor([[1, 0, 1]])), "padding between real tokens"),
    (lambda: Padded.of_attention_mask(torch.tensor([[0, 1], [1, 0]])), "on one side"),
    (lambda: Padded.of_attention_mask(torch.tensor([[2, 1]])), "ones .* and zeros"),
    (lambda: Table(torch.ones(B, 3, L, L).bool()), "Table takes a bool tensor"),
    (lambda: Table(torch.zeros(L, L)), "got a float32 tensor"),
    (given(SameDocument(torch.zeros(B, 4, dtype=torch.long))), "SameDocument numbers 4 positions, .* there are 6"),
    (given(Causal() & SameDocument(torch.zeros(B, 4, dtype=torch.long))), "give documents of length 6"),
    (lambda: Near(PLACES.expand(2, -1, -1), 1, torch.tensor([6])), "places for 2 sequences and lengths for 1"),
    (lambda: SlidingWindow(0), "contains no row; give a width of 1"),
    (lambda: Padded([1, 2]) & Padded([1, 2, 3]), "batch of 2 does not combine with one made for 3"),
    (lambda: Packed(((2, 1),)) | Packed(((2, 2),)), "length of 3 does not combine")])
def test_what_cannot_be_a_mask_is_refused_in_one_sentence(make, why, unchecked):
    with pytest.raises(UserError, match=why):
        make()


def test_strict_without_a_context_of_its_own_is_refused():
    attn, x = Attention(8, 2), torch.randn(1, 3, 8)
    rows = Rows(mask=Causal(), rotation=Rotary(4)(torch.arange(3)))
    assert attn(x, rows).shape == x.shape  # positive control
    with pytest.raises(UserError, match="strict selects the rows of a context to attend to"):
        attn(x, rows.having(strict=True))


def test_torchs_layout_is_noticed():
    q, k, v = (t.transpose(1, 2) for t in qkv(queries=40, keys=40))  # B H L K
    with pytest.warns(UserWarning, match=r"4 rows of 40 heads.*transpose\(1, 2\)"):
        attention(q, k, v, Full())
