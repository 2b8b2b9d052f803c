"""Self-distillation through a head: the divergence of some readouts from a better one, without all logits in memory.

    tau^2 KL(softmax(W t / tau) || softmax(W s / tau))

t is the head's input of the teacher, s that of a student, W the head. tau^2 keeps the size of the gradient when the
temperature tau changes (Hinton et al. 2015, arXiv 1503.02531, section 2). The teacher gets no gradient.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from looped.nn import fused
from looped.nn.fused import compute_dtype, plus_product, row_parts
from looped.tensor_types import Float


def linear_divergence(students: Float[Tensor, "students batch length width"],
                      teacher: Float[Tensor, "batch length width"], weight: Float[Tensor, "vocab width"], *,
                      temperature: float) -> Float[Tensor, "students batch length"]:
    """The divergence of every row of every student from the teacher, in nats, in float32 or wider.

    Gradients reach the students and, through them, the head. Backward recomputes the logits, some rows at a time.
    """
    return _LinearDivergence.apply(students, teacher.detach(), weight, temperature, compute_dtype(teacher))


def divergence(students: Float[Tensor, "*students vocab"], teacher: Float[Tensor, "*rows vocab"], *,
               temperature: float) -> Float[Tensor, "*students"]:
    """`linear_divergence` of logits."""
    log_p, log_q = _log_chances(teacher.detach(), temperature), _log_chances(students, temperature)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_chances(logits: Tensor, temperature: float) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits.to(wide) / temperature, -1)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, students, teacher, weight, temperature, dtype):
        rows, head = teacher.flatten(0, -2), weight.to(dtype)
        found = students.new_empty(len(students), len(rows), dtype=torch.promote_types(teacher.dtype, torch.float32))
        for part in row_parts(rows, len(head)):
            best = rows[part].to(dtype) @ head.T
            for number, student in enumerate(students.flatten(1, -2)):
                found[number, part] = divergence(student[part].to(dtype) @ head.T, best, temperature=temperature)
        ctx.save_for_backward(students, teacher, weight)
        ctx.temperature, ctx.dtype = temperature, dtype
        return found.view(students.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        students, teacher, weight = ctx.saved_tensors
        rows, head, grads = teacher.flatten(0, -2), weight.to(ctx.dtype), grad.flatten(1).unsqueeze(-1)
        inner, grad_weight = students.flatten(1, -2), torch.zeros_like(weight)
        outer = torch.empty_like(inner)  # not of `students`, whose flattened gradient is a copy if they are transposed
        for part in row_parts(rows, len(head)):
            with fused.made_again():
                best = rows[part].to(ctx.dtype) @ head.T
            p = _log_chances(best, ctx.temperature).exp()
            for number, student in enumerate(inner):
                own = student[part].to(ctx.dtype)
                with fused.made_again():
                    logits = own @ head.T
                q = _log_chances(logits, ctx.temperature).exp()
                d_logits = (q.sub_(p) * (ctx.temperature * grads[number, part])).to(ctx.dtype)
                outer[number, part] = (d_logits @ head).to(outer.dtype)
                grad_weight = plus_product(grad_weight, d_logits.T, own)
        return outer.view_as(students), None, grad_weight, None, None
