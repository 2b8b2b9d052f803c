"""On a CUDA device: the loss and its gradients against float64 on the CPU, with a vocabulary that is padded.

Run with `pytest -m gpu tests/nn/test_loss_gpu.py`.
"""

import pytest
import torch
from test_fused import draw, plain_losses

from looped.nn.fused import linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
              pytest.mark.usefixtures("unchecked")]
ROWS, VOCAB, D = 700, 1000, 64


@pytest.mark.parametrize("with_evidence", [False, True], ids=["plain", "evidence"])
@pytest.mark.parametrize(("autocast", "most"), [(False, 5e-3), (True, 6e-2)], ids=["float32", "bf16"])
def test_losses_and_gradients_are_those_of_the_cpu(autocast, most, with_evidence):
    """Relative to their norm; float32 may run in TF32."""
    leaves = [draw(1, ROWS, D), draw(VOCAB, D, seed=1), draw(seed=2)]
    leaves += [draw(1, ROWS, 5, seed=3), draw(VOCAB, 5, seed=4)] if with_evidence else []
    targets = torch.randint(0, VOCAB, (1, ROWS), generator=torch.Generator().manual_seed(5))
    x, weight, scale, *evidence = leaves
    exact = plain_losses(x, weight, targets, scale, evidence or None)
    there = [leaf.detach().float().cuda().requires_grad_() for leaf in leaves]
    x, weight, scale, *evidence = there
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        losses = linear_cross_entropy(x, weight, targets.cuda(), scale=scale, evidence=tuple(evidence) or None)
    found = [losses, *torch.autograd.grad(losses.sin().sum(), there)]
    wanted = [exact, *torch.autograd.grad(exact.sin().sum(), leaves)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.detach().cpu().double() - theirs).norm() <= most * theirs.norm()
