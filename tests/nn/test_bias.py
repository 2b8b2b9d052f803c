"""Every mask against a brute-force double loop, its own picture, xformers' materialisation and flex's BlockMask."""

import gc
import itertools
import weakref

import pytest
import torch
from attention_oracle import MASKS, ONE_PIECE, L
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from looped.errors import UserError
from looped.nn.backends import flex_block_mask, run_flex, run_sdpa, xformers_bias, xformers_blocks, xformers_ops
from looped.nn.mask_base import OfRows, Table
from looped.nn.masks import Causal, CleanNoisy, Full, Near, Packed, Padded, SameDocument

B = 2
DOCUMENTS = ["aaabbc", "abbbbb"]
LENGTHS = [4, 6]
# name -> what a reader would say in words
WORDS = {
    "full": lambda b, q, k: True,
    "causal": lambda b, q, k: k <= q,
    "right padded": lambda b, q, k: k < LENGTHS[b] and q < LENGTHS[b] and k <= q,
    "left padded": lambda b, q, k: L - LENGTHS[b] <= k <= q,
    "padded, full": lambda b, q, k: k < LENGTHS[b] and q < LENGTHS[b],
    "padded, all of a row": lambda b, q, k: b == 1 and 3 <= k <= q,
    "packed": lambda b, q, k: DOCUMENTS[b][q] == DOCUMENTS[b][k] and k <= q,
    "packed, full": lambda b, q, k: DOCUMENTS[b][q] == DOCUMENTS[b][k],
    "clean|noisy": lambda b, q, k: k <= q if q < 3 else (k < 3 and k <= q - 3) or k == q,
    "clean|noisy, strict": lambda b, q, k: k <= q if q < 3 else (k < 3 and k < q - 3) or k == q,
    "same document, causal": lambda b, q, k: k <= q and ["aabbbc", "abbbbb"][b][q] == ["aabbbc", "abbbbb"][b][k],
    "clean|noisy, same document": lambda b, q, k: ["abb", "aaa"][b][q % 3] == ["abb", "aaa"][b][k % 3] and (
        k <= q if q < 3 else (k < 3 and k <= q - 3) or k == q),
}
needs_xformers = pytest.mark.skipif(xformers_ops() is None, reason="xformers is not installed")


def brute_force(mask, words, queries, keys):
    offset = keys - queries
    return torch.tensor([[[[bool(words(b, q + offset, k)) for k in range(keys)] for q in range(queries)]]
                         for b in range(mask.batch or 1)])


@pytest.mark.parametrize("queries", [L, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_dense_equals_the_double_loop_with_queries_at_the_end(name, queries):
    mask = MASKS[name]
    assert torch.equal(mask.dense(B, queries, L), brute_force(mask, WORDS[name], queries, L))


@pytest.mark.parametrize(("mask", "column"), [
    (Full(), 0), (Causal(), 0), (Padded([2]), 0), (Padded([2], side="left", width=3), 1), (Packed(((2, 2),)), 0),
    (CleanNoisy(2), 0), (CleanNoisy(2, strict=True), 1), (CleanNoisy(3) & SameDocument(torch.tensor([[0, 1, 1]])), 0)])
def test_the_picture_in_the_docstring_is_the_mask(mask, column):
    size = mask.size or 3
    picture = getattr(mask, "second", mask).__doc__.split("```")[1].splitlines()[1 : size + 1]
    drawn = [[part.split() for part in line.split("   ") if part.strip()][column] for line in picture]
    assert drawn == [["#" if seen else "." for seen in row] for row in mask.dense(1, size, size)[0, 0]]


def one_row(dense, batch):
    """The batch laid end to end in one row, as xformers has it: no row sees another."""
    return torch.block_diag(*dense.expand(batch, -1, -1, -1)[:, 0].int()).bool()


def materialised_blocks(mask, batch, queries, keys):
    """What `xformers_blocks` says, back at the rows' places in the flattened batch."""
    blocks = xformers_blocks(mask, batch, queries, keys, torch.device("cpu"))
    seen = torch.zeros(batch * queries, batch * keys, dtype=torch.bool)
    if blocks.bias is None:
        return seen
    rows, columns = (torch.arange(total) if index is None else index for index, total in
                     ((blocks.q_index, batch * queries), (blocks.k_index, batch * keys)))
    seen[rows.unsqueeze(1), columns] = blocks.bias.materialize((len(rows), len(columns))) == 0
    return seen


@needs_xformers
@pytest.mark.parametrize("queries", [L, 2, 1])
@pytest.mark.parametrize("name", [name for name in MASKS if "pa" in name])
def test_xformers_blocks_materialise_to_packed_and_padded_masks(name, queries):
    mask = MASKS[name]
    assert torch.equal(materialised_blocks(mask, B, queries, L), one_row(mask.dense(B, queries, L), B))


@needs_xformers
@pytest.mark.parametrize("queries", [L, 4, 1])
def test_xformers_materialises_the_same_causal_mask(queries):
    theirs = xformers_bias(Causal(), queries, L).materialize((queries, L)) == 0
    assert torch.equal(Causal().dense(1, queries, L)[0, 0], theirs)


@needs_xformers
def test_without_padding_nothing_is_gathered():
    blocks = xformers_blocks(MASKS["packed"], B, L, L, torch.device("cpu"))
    assert blocks.q_index is None
    assert blocks.k_index is None


@pytest.mark.parametrize("queries", [L, 2])
@pytest.mark.parametrize("name", ONE_PIECE)
def test_flex_evaluates_the_same_mask(name, queries):
    mask = MASKS[name]
    block = flex_block_mask(mask, B, queries, L, torch.device("cpu"))
    b, q, k = torch.meshgrid(torch.arange(mask.batch or 1), torch.arange(queries), torch.arange(L), indexing="ij")
    assert torch.equal(block.mask_mod(b, 0, q, k), mask.dense(B, queries, L)[:, 0])


class Moves(TorchDispatchMode):
    """Refuses every copy of a tensor to another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        device = (kwargs or {}).get("device")
        if func.overloadpacket.__name__ == "_to_copy" and device is not None and device != args[0].device:
            raise RuntimeError(f"a tensor of {args[0].device} goes to {device}")
        return func(*args, **(kwargs or {}))


HOLDING = {"padded": MASKS["left padded"], "packed": MASKS["packed"], "pair": MASKS["same document, causal"],
           "near": Near(torch.arange(L).view(1, L, 1).expand(B, L, 1), 1, torch.tensor([3, L])),
           "some rows": OfRows(MASKS["packed"], torch.tensor([1, 0])),
           "table": Table(torch.ones(B, L, L, dtype=torch.bool))}


@pytest.mark.parametrize("mask", HOLDING.values(), ids=HOLDING)
def test_the_mask_in_flex_holds_its_tensors_on_the_device(mask, unchecked):
    """So its kernel, which evaluates the mask, copies none."""
    block = flex_block_mask(mask, B, L, L, torch.device("meta"))
    b, q, k = (torch.zeros(1, dtype=torch.long, device="meta") for _ in "bqk")
    with Moves():
        assert block.mask_mod(b, 0, q, k).device.type == "meta"
        with pytest.raises(RuntimeError, match="a tensor of cpu goes to meta"):
            mask.allow(q, k, b)  # positive control: the mask itself keeps them where they were made


@needs_xformers
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 7).flatmap(lambda width: st.tuples(
    st.just(width), st.lists(st.integers(0, width), min_size=1, max_size=3), st.integers(1, width))),
    side=st.sampled_from(["left", "right"]), causal=st.booleans())
def test_any_padding_reads_the_same_everywhere(rows, side, causal):
    width, lengths, queries = rows
    mask, words = Padded(lengths, side=side, causal=causal, width=width), {
        "right": lambda b, q, k: k < lengths[b] and q < lengths[b] and (k <= q or not causal),
        "left": lambda b, q, k: min(q, k) >= width - lengths[b] and (k <= q or not causal)}[side]
    dense = mask.dense(len(lengths), queries, width)
    assert torch.equal(dense, brute_force(mask, words, queries, width))
    assert torch.equal(materialised_blocks(mask, len(lengths), queries, width), one_row(dense, len(lengths)))


@needs_xformers
@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.sets(st.integers(1, 7)), min_size=1, max_size=3), queries=st.integers(1, 8),
       causal=st.booleans())
def test_any_packing_reads_the_same_everywhere(cuts, queries, causal):
    edges = [[0, *sorted(row), 8] for row in cuts]
    lengths = tuple(tuple(b - a for a, b in itertools.pairwise(row)) for row in edges)
    mask = Packed(lengths, causal=causal)

    def words(b, q, k):
        return sum(cut <= q for cut in cuts[b]) == sum(cut <= k for cut in cuts[b]) and (k <= q or not causal)

    dense = mask.dense(len(cuts), queries, 8)
    assert torch.equal(dense, brute_force(mask, words, queries, 8))
    assert torch.equal(materialised_blocks(mask, len(cuts), queries, 8), one_row(dense, len(cuts)))


def test_documents_may_be_numbered_instead_of_measured():
    numbered = Packed(torch.tensor([[7, 7, 7, 2, 2, 5], [0, 1, 1, 1, 1, 1]]))
    assert torch.equal(numbered.dense(B, L, L), MASKS["packed"].dense(B, L, L))


def test_a_form_is_made_once_for_a_mask_and_freed_with_it(monkeypatch, unchecked):
    mask, made = Padded([2, 3]), []
    dense = Padded.dense
    monkeypatch.setattr(Padded, "dense", lambda self, *sizes: made.append(1) or dense(self, *sizes))
    q = torch.randn(2, 3, 1, 4)
    for _ in range(3):
        run_sdpa(q, q, q, mask)
        run_flex(q, q, q, mask)
    assert len(made) == 1
    gone = weakref.ref(mask)
    gc.disable()
    try:
        del mask
        assert gone() is None, "a form refers back to its mask"
    finally:
        gc.enable()


@pytest.mark.parametrize(("make", "why"), [
    (lambda: Padded([4, 6], width=5), "pad to 6"),
    (lambda: Padded([4, 6]).dense(2, 5, 5), "pad to 6"),
    (lambda: Padded([4, -1]), "negative"),
    (lambda: Padded([4], side="top"), "'right' or 'left'"),
    (lambda: Padded([4], side="left"), "needs width"),
    (lambda: Packed(((3, 2), (4,))), r"rows have \[5, 4\]"),
    (lambda: Packed(((3, 0),)), "must be positive"),
    (lambda: Packed(torch.tensor([[0, 1, 0]])), "row 0 of documents returns to an earlier"),
    (lambda: Packed(((3, 2),)).dense(1, 4, 4), "made for length 5, the keys have 4"),
    (lambda: Packed(((3, 2), (5,))).dense(3, 5, 5), "made for 2 sequences, the batch has 3"),
    (lambda: Causal().dense(1, 3, 2), "at most 2")])
def test_a_mask_that_does_not_fit_is_refused_with_the_reason(make, why):
    with pytest.raises(UserError, match=why):
        make()


OF_ROWS = [
    Padded([3, 1, 2], causal=False), Padded([3, 1, 2], side="left", width=3), Packed(((1, 2), (3,), (2, 1))), Causal(),
    Full(), Near(torch.arange(3).view(1, 3, 1), 1),
    Near(torch.tensor([[[0], [1], [2]], [[0], [2], [4]], [[0], [0], [5]]]), 1, torch.tensor([3, 1, 2])),
]


@pytest.mark.parametrize("mask", OF_ROWS, ids=lambda mask: type(mask).__name__)
def test_the_mask_of_some_rows_is_that_part_of_the_whole(mask):
    rows = torch.tensor([2, 0])
    assert torch.equal(mask.of_rows(rows).dense(2, 3, 3).expand(2, -1, -1, -1),
                       mask.dense(3, 3, 3).expand(3, -1, -1, -1)[rows])


def test_near_is_at_most_so_far_on_every_axis():
    """Cells of a 3 x 3 grid: with window 1 the middle sees all, a corner its three neighbours and itself."""
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"), dim=-1).view(1, 9, 2)
    seen = Near(grid, 1).dense(1, 9, 9)[0, 0]
    assert seen[4].all()
    assert seen[0].nonzero().flatten().tolist() == [0, 1, 3, 4]
    assert seen[5].nonzero().flatten().tolist() == [1, 2, 4, 5, 7, 8]


def test_near_shows_nothing_of_what_fills_a_row_up():
    places = torch.arange(4).view(1, 4, 1).expand(2, 4, 1)
    seen = Near(places, 9, torch.tensor([4, 2])).dense(2, 4, 4)
    assert seen[0].all()
    assert seen[1, 0, :2, :2].all()
    assert seen[1].sum() == 4


def test_the_rows_of_blocks_reach_a_device_without_a_wait(monkeypatch):
    """Their index is pinned and copied without blocking, as xformers copies the lengths."""
    from looped.nn import backends

    copies = []
    monkeypatch.setattr(backends, "pinned", lambda values, device: copies.append("pinned") or values)
    monkeypatch.setattr(backends, "to_device", lambda values, device: copies.append("copied") or values)
    assert backends._index([range(2), range(4, 6)], 8, torch.device("cpu")).tolist() == [0, 1, 4, 5]
    assert copies == ["pinned", "copied"]
    assert backends._index([range(8)], 8, torch.device("cpu")) is None
