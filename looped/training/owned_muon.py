"""Muon for a sharded model: each matrix is orthogonalised whole by one process, its owner.

Momentum, weight decay and the step act on every weight by itself, so each process applies them to its part. Only the
direction is orthogonalised as a matrix: its parts go to the owner, and parts of the result come back, with one exchange
each way for all matrices. On the same parts torch's Muon gathers the factors of every product, on all processes alike.
Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Shard
from torch.optim import Muon, _muon

Pieces = list[list[Tensor]]
"""Tensors by process, in the order of its matrices."""


class OwnedMuon(Muon):
    """torch's Muon over matrices that are sharded by rows (`Shard(0)`) over the processes of one mesh. Its state is
    laid out as they are."""

    travels = torch.bfloat16
    """The number format of the exchanges: torch's iteration rounds its input to it and gives its result in it."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # ty: ignore[invalid-method-override]
        """One update of all matrices that have a gradient; they are the same ones on all processes."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params, grads, buffers = [], [], []
            self._init_group(group, params, grads, buffers)
            if params:
                self._update(group, params, *([each.to_local() for each in tensors] for tensors in (grads, buffers)))
        return loss

    def _update(self, group: dict[str, Any], params: list[Any], grads: list[Tensor], buffers: list[Tensor]) -> None:
        """The update of torch's Muon; grads, buffers: this process's parts."""
        lr, momentum = group["lr"], group["momentum"]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        directions = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers

        def orthogonal(direction: Tensor) -> Tensor:
            return _muon._zeropower_via_newtonschulz(direction, group["ns_coefficients"], group["ns_steps"],
                                                     group["eps"])

        parts = by_owners([part.to(self.travels) for part in directions], params, orthogonal)
        for param, part in zip(params, parts, strict=True):
            weight = param.to_local()
            weight.mul_(1 - lr * group["weight_decay"])
            weight.add_(part, alpha=-_muon._adjust_lr(lr, group["adjust_lr_fn"], param.shape))


def by_owners(parts: list[Tensor], like: Sequence[Any], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """This process's parts of `function(matrix)` for each matrix, of which `parts` are its parts; it is applied by the
    owner of the matrix alone. like: sharded tensors (DTensor) of the same shapes and shards."""
    mesh = like[0].device_mesh
    num, rank = mesh.size(), mesh.get_local_rank()
    owned = matrices_by_owner([tensor.shape for tensor in like], num)
    rows = [[Shard.local_shard_size_and_offset(len(like[each]), num, process)[0] for process in range(num)]
            for each in owned[rank]]
    shapes = [[torch.Size((sizes[process], like[each].shape[1])) for each, sizes in zip(owned[rank], rows, strict=True)]
              for process in range(num)]
    received = exchange([[parts[each] for each in matrices] for matrices in owned], shapes, parts[0], mesh.get_group())
    made = [function(torch.cat(pieces)).split(sizes) for *pieces, sizes in zip(*received, rows, strict=True)]
    returned = exchange([[pieces[process] for pieces in made] for process in range(num)],
                        [[parts[each].shape for each in matrices] for matrices in owned], parts[0], mesh.get_group())
    found = {each: part for matrices, pieces in zip(owned, returned, strict=True)
             for each, part in zip(matrices, pieces, strict=True)}
    return [found[each] for each in range(len(parts))]


def exchange(pieces: Pieces, shapes: list[list[torch.Size]], like: Tensor, group: ProcessGroup) -> Pieces:
    """Send pieces[q] to every process q, and receive from it pieces of shapes[q], by one collective operation. like: a
    tensor of their number format and device."""
    sent = torch.cat([like.new_empty(0), *(piece.flatten() for each in pieces for piece in each)])
    received = like.new_empty(sum(shape.numel() for each in shapes for shape in each))
    dist.all_to_all_single(received, sent, [sum(shape.numel() for shape in each) for each in shapes],
                           [sum(piece.numel() for piece in each) for each in pieces], group=group)
    flat = iter(received.split([shape.numel() for each in shapes for shape in each]))
    return [[next(flat).view(shape) for shape in each] for each in shapes]


def matrices_by_owner(shapes: Sequence[torch.Size], num: int) -> list[list[int]]:
    """The matrices of each of `num` processes: the costliest first, each to the process with the least work so far."""
    owned: list[list[int]] = [[] for _ in range(num)]
    work = [0] * num
    for each in sorted(range(len(shapes)), key=lambda each: iteration_flops(shapes[each]), reverse=True):
        owner = min(range(num), key=work.__getitem__)
        owned[owner].append(each)
        work[owner] += iteration_flops(shapes[each])
    return owned


def iteration_flops(shape: torch.Size) -> int:
    """FLOPs of one Newton-Schulz iteration: two products with the matrix and a square of its smaller side."""
    small, large = sorted(shape)
    return 2 * small * small * (2 * large + small)
