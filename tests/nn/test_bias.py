"""Every mask against a brute-force double loop, against xformers' own materialisation, and against flex's BlockMask."""

import pytest
import torch

from looped.errors import UserError
from looped.nn.backends import flex_block_mask, xformers_bias, xformers_ops
from looped.nn.bias import Causal, CleanNoisy, Full, Packed, Padded

L = 6
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
LENGTHS = torch.tensor([4, 6])

# name -> (mask, rows, what a reader would say in words)
MASKS = {
    "full": (Full(), L, lambda b, q, k: True),
    "causal": (Causal(), L, lambda b, q, k: k <= q),
    "right padded": (Padded.from_lengths(LENGTHS, L), L, lambda b, q, k: k < LENGTHS[b] and k <= q),
    "left padded": (Padded.from_lengths(LENGTHS, L, side="left"), L, lambda b, q, k: L - LENGTHS[b] <= k <= q),
    "padded, full": (Padded.from_lengths(LENGTHS, L, causal=False), L, lambda b, q, k: k < LENGTHS[b]),
    "packed": (Packed(DOCUMENTS), L, lambda b, q, k: DOCUMENTS[b, q] == DOCUMENTS[b, k] and k <= q),
    "packed, full": (Packed(DOCUMENTS, causal=False), L, lambda b, q, k: DOCUMENTS[b, q] == DOCUMENTS[b, k]),
    "clean|noisy": (CleanNoisy(3), L, lambda b, q, k: k <= q if q < 3 else (k < 3 and k <= q - 3) or k == q),
    "clean|noisy, strict": (CleanNoisy(3, strict=True), L,
                            lambda b, q, k: k <= q if q < 3 else (k < 3 and k < q - 3) or k == q),
}


def brute_force(mask, rows, words, offset=0):
    return torch.tensor([[[[bool(words(b, q + offset, k)) for k in range(rows)] for q in range(rows - offset)]]
                         for b in range(mask.batch)])


@pytest.mark.parametrize("name", MASKS)
def test_dense_equals_the_double_loop(name):
    mask, rows, words = MASKS[name]
    assert torch.equal(mask.dense(rows, rows), brute_force(mask, rows, words))


@pytest.mark.parametrize("name", [name for name in MASKS if "noisy" not in name])
def test_fewer_queries_than_keys_are_the_last_rows(name):
    mask, rows, words = MASKS[name]
    assert torch.equal(mask.dense(rows - 4, rows), brute_force(mask, rows, words, offset=4))


@pytest.mark.parametrize("name", ["causal", "packed", "packed, full"])
def test_xformers_materialises_the_same_mask(name):
    if xformers_ops() is None:
        pytest.skip("xformers is not installed")
    mask, rows, _ = MASKS[name]
    total = mask.batch * rows
    theirs = xformers_bias(mask, total, total).materialize((total, total)) == 0
    ours = torch.block_diag(*mask.dense(rows, rows)[:, 0].int()).bool()  # xformers lays the batch out in one row
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("queries", [1, 4])
def test_xformers_bottom_right_is_our_cache_alignment(queries):
    if xformers_ops() is None:
        pytest.skip("xformers is not installed")
    theirs = xformers_bias(Causal(), queries, L).materialize((queries, L)) == 0
    assert torch.equal(Causal().dense(queries, L)[0, 0], theirs)


@pytest.mark.parametrize("queries", [L, 2])
@pytest.mark.parametrize("name", [name for name in MASKS if "noisy" not in name])
def test_flex_evaluates_the_same_mask(name, queries):
    mask, rows, _ = MASKS[name]
    block = flex_block_mask(mask, queries, rows, torch.device("cpu"))
    b, q, k = torch.meshgrid(torch.arange(mask.batch), torch.arange(queries), torch.arange(rows), indexing="ij")
    assert torch.equal(block.mask_mod(b, 0, q, k), mask.dense(queries, rows)[:, 0])


def test_padding_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="pad to 6"):
        Padded.from_lengths(LENGTHS, 5)
    with pytest.raises(UserError, match="'right' or 'left'"):
        Padded.from_lengths(LENGTHS, 6, side="top")
