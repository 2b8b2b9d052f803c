"""The lean norms, projections and loss equal the plain formulas in value and gradient, and keep less."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from looped.nn import fused
from looped.nn.fused import linear_cross_entropy, project, rms_norm

B, L, D, HIDDEN = 3, 5, 8, 12


def draw(*shape, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=dtype).requires_grad_()


def plain_norm(x, weight, scale, shift):
    out = F.rms_norm(x, (x.shape[-1],), weight, eps=1e-6)
    return out if scale is None else out * (1 + scale) + shift


def plain_project(x, weight, gate, activation):
    if activation == "swiglu":
        a, b = x.chunk(2, -1)
        x = F.silu(a) * b
    x = F.gelu(x) if activation == "gelu" else x
    out = F.linear(x, weight)
    return out if gate is None else out * gate


def same_gradients(first, second, inputs):
    grad = torch.randn_like(first)
    for a, b in zip(torch.autograd.grad(first, inputs, grad), torch.autograd.grad(second, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [None, 1, L], ids=["plain", "by sequence", "by token"])
def test_rms_norm_equals_torchs(rows):
    x, weight = draw(B, L, D), draw(D, seed=1)
    scale, shift = (None, None) if rows is None else (draw(B, rows, D, seed=2), draw(B, rows, D, seed=3))
    ours = rms_norm(x, weight, scale=scale, shift=shift)
    theirs = plain_norm(x, weight, scale, shift)
    torch.testing.assert_close(ours, theirs)
    same_gradients(ours, theirs, [t for t in (x, weight, scale, shift) if t is not None])


@pytest.mark.parametrize("length", [L, 5 * L], ids=["short", "long"])
@pytest.mark.parametrize("activation", [None, "swiglu", "gelu"])
@pytest.mark.parametrize("by", [None, "all", "place", "sequence", "token"])
def test_project_equals_the_plain_formula(by, activation, length):
    x, weight = draw(B, length, HIDDEN * (2 if activation == "swiglu" else 1)), draw(D, HIDDEN, seed=1)
    shape = 1 if by in ("all", "place") else B, 1 if by in ("all", "sequence") else length, D
    gate = None if by is None else draw(*shape, seed=2)
    assert fused._is_long(x) == (length > L)
    ours, theirs = project(x, weight, gate=gate, activation=activation), plain_project(x, weight, gate, activation)
    torch.testing.assert_close(ours, theirs)
    same_gradients(ours, theirs, [t for t in (x, weight, gate) if t is not None])


def transposed(x):
    """The same numbers with the first two axes stored in the other order, whose flattened rows are a copy."""
    x = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert x.flatten(0, -2).untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    return x


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_project_of_a_transposed_input_has_the_gradient_of_the_plain_formula(activation, gated):
    x, weight = transposed(draw(B, L, HIDDEN * (2 if activation == "swiglu" else 1))), draw(D, HIDDEN, seed=1)
    gate = draw(B, 1, D, seed=2) if gated else None
    ours, theirs = project(x, weight, gate=gate, activation=activation), plain_project(x, weight, gate, activation)
    same_gradients(ours, theirs, [t for t in (x, weight, gate) if t is not None])


def kept_numbers(function, *leaves):
    """Numbers kept for backward beyond the leaves themselves."""
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


def test_a_gated_swiglu_projection_keeps_nothing_and_the_plain_one_does():
    x, weight, gate = draw(B, L, 2 * HIDDEN), draw(D, HIDDEN, seed=1), draw(B, 1, D, seed=2)
    assert kept_numbers(lambda: project(x, weight, gate=gate, activation="swiglu"), x, weight, gate) == 0
    assert kept_numbers(lambda: plain_project(x, weight, gate, "swiglu"), x, weight, gate) >= B * L * (2 * HIDDEN + D)


def test_a_modulated_norm_keeps_one_number_a_row():
    x, weight, scale, shift = draw(B, L, D), draw(D, seed=1), draw(B, 1, D, seed=2), draw(B, 1, D, seed=3)
    kept = kept_numbers(lambda: rms_norm(x, weight, scale=scale, shift=shift), x, weight, scale, shift)
    assert kept == B * L


@pytest.mark.parametrize("length", [L, 20 * L], ids=["short", "long"])
@pytest.mark.parametrize("activation", [None, "swiglu", "gelu"])
def test_autocast_runs_products_in_bf16_within_twice_the_plain_error(activation, length):
    x = draw(B, length, HIDDEN * (2 if activation == "swiglu" else 1), dtype=torch.float32)
    weight = draw(D, HIDDEN, seed=1, dtype=torch.float32)
    gate = draw(B, 1, D, seed=2, dtype=torch.float32)
    exact = plain_project(x, weight, gate, activation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = project(x, weight, gate=gate, activation=activation), plain_project(x, weight, gate, activation)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-2
    ours_grad = torch.autograd.grad(ours.float().sum(), [x, weight, gate])
    exact_grad = torch.autograd.grad(exact.sum(), [x, weight, gate])
    for a, b in zip(ours_grad, exact_grad, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 0.05 * b.abs().max()


VOCAB = 300


def head_inputs(dtype=torch.float64):
    targets = torch.randint(0, VOCAB, (B, 120), generator=torch.Generator().manual_seed(3))
    return draw(B, 120, D, dtype=dtype), draw(VOCAB, D, seed=1, dtype=dtype), targets, draw(seed=2, dtype=dtype)


def plain_losses(x, weight, targets, scale, evidence=None):
    logits = F.linear(x, weight) * (1 if scale is None else scale)
    logits = logits if evidence is None else logits + evidence[0] @ evidence[1].T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


@pytest.fixture
def small_parts(monkeypatch):
    """360 rows in three uneven parts."""
    monkeypatch.setattr(fused, "row_parts", lambda rows, vocab: [slice(0, 150), slice(150, 300), slice(300, 360)])


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("scaled", [False, True])
def test_linear_cross_entropy_equals_the_plain_formula_token_by_token(scaled):
    x, weight, targets, scale = head_inputs()
    ours = linear_cross_entropy(x, weight, targets, scale=scale if scaled else None)
    theirs = plain_losses(x, weight, targets, scale if scaled else None)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    same_gradients(ours, theirs, [x, weight, scale] if scaled else [x, weight])


@pytest.mark.usefixtures("small_parts")
def test_evidence_is_added_to_the_logits_exactly():
    x, weight, targets, scale = head_inputs()
    evidence = draw(B, 120, 5, seed=4), draw(VOCAB, 5, seed=5)
    ours = linear_cross_entropy(x, weight, targets, scale=scale, evidence=evidence)
    theirs = plain_losses(x, weight, targets, scale, evidence)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    same_gradients(ours, theirs, [x, weight, scale, *evidence])


@pytest.mark.usefixtures("small_parts")
def test_transposed_rows_and_evidence_have_the_gradients_of_the_plain_formula():
    x, weight, targets, scale = head_inputs()
    x, evidence = transposed(x), (transposed(draw(B, 120, 5, seed=4)), draw(VOCAB, 5, seed=5))
    ours = linear_cross_entropy(x, weight, targets, scale=scale, evidence=evidence)
    same_gradients(ours, plain_losses(x, weight, targets, scale, evidence), [x, weight, scale, *evidence])


def test_evidence_is_not_rounded_to_bf16():
    x, weight, targets, _ = head_inputs(torch.float32)
    evidence = draw(B, 120, 5, seed=4, dtype=torch.float32) * 30, draw(VOCAB, 5, seed=5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(x * 0, weight, targets, evidence=evidence)
    torch.testing.assert_close(ours, plain_losses(x * 0, weight, targets, None, evidence), rtol=1e-4, atol=1e-4)


def test_linear_cross_entropy_passes_gradcheck():
    x, weight, scale = draw(1, 4, D), draw(VOCAB, D, seed=1), draw(seed=2)
    targets = torch.tensor([[0, 7, 7, VOCAB - 1]])
    assert torch.autograd.gradcheck(lambda x, w, s: linear_cross_entropy(x, w, targets, scale=s), (x, weight, scale))


def test_linear_cross_entropy_keeps_one_number_a_row_and_the_plain_one_the_logits():
    x, weight, targets, scale = head_inputs()
    leaves = x, weight, targets, scale
    assert kept_numbers(lambda: linear_cross_entropy(x, weight, targets, scale=scale), *leaves) == B * 120
    assert kept_numbers(lambda: plain_losses(*leaves), *leaves) >= B * 120 * VOCAB


def test_linear_cross_entropy_under_autocast_is_within_twice_the_plain_error():
    x, weight, targets, scale = head_inputs(torch.float32)
    exact = plain_losses(x, weight, targets, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = (f(x, weight, targets, scale=scale) for f in (linear_cross_entropy, plain_losses))
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()
    pairs = zip(torch.autograd.grad(ours.sum(), [x, weight, scale]),
                torch.autograd.grad(exact.sum(), [x, weight, scale]), strict=True)
    assert all((a - b).abs().max() <= 0.05 * b.abs().max() for a, b in pairs)
