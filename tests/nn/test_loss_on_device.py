"""The loss as a CUDA device computes it: in aligned chunks, compiled, with the head's gradient added by its product.

Without such a device, its ways are taken on the CPU: chunks and vocabulary in multiples, functions compiled by
aot_eager or by Inductor for the CPU, and a stand-in for the product that CUDA alone offers.
"""

import warnings
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from pretend_device import NO_KERNEL
from test_fused import VOCAB, D, draw, head_inputs, plain_losses, same_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from looped import fused_on_cuda
from looped.nn import fused
from looped.nn.fused import Chunking, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("unchecked")  # torch.compile cannot look into the checks of shapes
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Traffic(TorchDispatchMode):
    """Counts the `bytes` that kernels read and write, each operation by itself."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") not in NO_KERNEL:
            read = {id(each): each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
            written = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
            self.bytes += sum(each.numel() * each.element_size() for each in (*read.values(), *written) if each.ndim)
        return out


@pytest.fixture
def aligned(monkeypatch):
    """Chunks of a device: rows in multiples of 16, as many as `aligned(logits)` allows; 300 tokens padded to 320."""
    def chunks(num_logits):
        monkeypatch.setitem(fused.CHUNKING, "cpu", Chunking(num_logits, rows=16, vocab=64))

    chunks(2**15)
    return chunks


@pytest.fixture
def recent(monkeypatch):
    """The CPU passes for a recent CUDA device and has its product, `torch.addmm(out_dtype=)`, under the conditions
    that torch's documentation names; a list of the shapes it was used for."""
    used = []

    def product(total, a, b, out_dtype, *, beta=1, alpha=1, out):
        assert (beta, alpha) == (1, 1)
        assert a.dtype == b.dtype
        assert out_dtype == total.dtype == out.dtype
        assert out_dtype == a.dtype or (out_dtype == torch.float32 and a.dtype == torch.bfloat16)
        used.append(tuple(total.shape))
        return out.copy_(torch.addmm(total, a.to(out_dtype), b.to(out_dtype)))

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", product, "CPU")
    monkeypatch.setattr(fused, "is_recent_cuda", lambda device: True)
    yield used
    library._destroy()


@pytest.fixture
def graphs(monkeypatch):
    """Chunks run as graphs, in which no break is allowed; a list of their names."""
    seen = []

    def on_device(function, device):
        if torch.compiler.is_compiling():
            return function
        seen.append(function.__name__)
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    torch._dynamo.reset()
    monkeypatch.setattr(fused, "on_device", on_device)
    return seen


# ---- chunks and vocabulary -------------------------------------------------------------------------------------------

def parts(num_rows, vocab, device):
    rows = type("Rows", (), {"device": device, "__len__": lambda self: num_rows})()
    found = fused.row_parts(rows, vocab)
    assert [part.start for part in found] == [0, *(part.stop for part in found)][:len(found)]
    assert not found or found[-1].start < num_rows <= found[-1].stop
    return [part.stop - part.start for part in found]


@pytest.mark.parametrize(("num_rows", "vocab", "lengths"), [
    (16_384, 4096, [16_384]), (16_384, 50_304, [4096] * 4), (16_384, 151_936, [1536] * 11), (100, 4096, [256]),
    (5000, 50_304, [5120]), (3000, 2**21, [256] * 12), (0, 4096, [])])
def test_a_device_has_few_chunks_of_aligned_rows(num_rows, vocab, lengths):
    assert parts(num_rows, vocab, CUDA) == lengths
    assert all(length * vocab <= 2**28 for length in lengths if length > 256)


@pytest.mark.parametrize(("num_rows", "vocab", "length"), [(2000, 257, 4080), (2000, 4096, 256), (2000, 50_257, 128)])
def test_a_cpu_has_the_chunks_that_fit_its_cache(num_rows, vocab, length):
    assert set(parts(num_rows, vocab, CPU)) == {length}


def test_no_table_is_padded_on_a_cpu():
    table = draw(VOCAB, D)
    assert fused._aligned(table, table.dtype) is table


@pytest.mark.usefixtures("aligned")
def test_padding_adds_rows_of_zeros():
    table = fused._aligned(draw(VOCAB, D), torch.bfloat16)
    assert (table.shape, table.dtype) == ((320, D), torch.bfloat16)
    assert table[:VOCAB].any(1).all()
    assert not table[VOCAB:].any()
    assert len(fused._aligned(draw(128, D), torch.float32)) == 128


# ---- the same losses and gradients -----------------------------------------------------------------------------------

def leaves_of(dtype=torch.float64):
    x, weight, targets, scale = head_inputs(dtype)
    evidence = draw(3, 120, 5, seed=4, dtype=dtype), draw(VOCAB, 5, seed=5, dtype=dtype)
    return x, weight, targets, scale, evidence


@pytest.mark.parametrize("num_logits", [1, 2**16, 2**20], ids=["128 rows", "192", "all"])
@pytest.mark.parametrize("with_evidence", [False, True], ids=["plain", "evidence"])
@pytest.mark.parametrize("as_graphs", [False, True], ids=["eager", "graphs"])
def test_losses_and_gradients_are_those_of_the_plain_formula(aligned, request, num_logits, with_evidence, as_graphs):
    aligned(num_logits)
    graphs = request.getfixturevalue("graphs") if as_graphs else None
    x, weight, targets, scale, evidence = leaves_of()
    evidence = evidence if with_evidence else None
    ours = linear_cross_entropy(x, weight, targets, scale=scale, evidence=evidence)
    theirs = plain_losses(x, weight, targets, scale, evidence)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    same_gradients(ours, theirs, [x, weight, scale, *(evidence or ())])
    assert graphs is None or set(graphs) == {"_losses", "_gradient"}


@pytest.mark.usefixtures("aligned")
def test_a_tied_head_of_fewer_rows_than_the_embedding_gets_its_gradient():
    x, _, targets, _ = head_inputs()
    embedding = draw(VOCAB + 1, D, seed=1)  # the last is the mask token, which has no logit
    ours = linear_cross_entropy(x, embedding[:VOCAB], targets)
    theirs = plain_losses(x, embedding[:VOCAB], targets, None)
    same_gradients(ours, theirs, [x, embedding])


@pytest.mark.usefixtures("aligned")
def test_a_padded_token_has_no_share_of_the_softmax_however_low_the_others():
    x, weight, targets, _ = head_inputs()
    low = weight.detach() - 1e3 * torch.eye(VOCAB, D, dtype=weight.dtype).sum(0)  # all logits far below 0
    x = x.detach().abs() + 1
    ours = linear_cross_entropy(x, low, targets)
    torch.testing.assert_close(ours, plain_losses(x, low, targets, None), rtol=1e-10, atol=1e-10)


def results(loss, dtype, autocast=False):
    """Losses and gradients, with scale and evidence, of the same numbers in any dtype."""
    x, weight, targets, scale, evidence = leaves_of(torch.float32)
    x, weight, scale, *evidence = (each.detach().to(dtype).requires_grad_() for each in (x, weight, scale, *evidence))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = loss(x, weight, targets, scale=scale, evidence=evidence)
    return [losses.detach(), *torch.autograd.grad(losses.sin().sum(), (x, weight, scale, *evidence))]


def errors(found, exact):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize(("autocast", "most"), [(False, 1e-6), (True, 1e-2)], ids=["float32", "bf16"])
def test_a_device_is_as_exact_as_the_cpu(aligned, graphs, recent, monkeypatch, autocast, most):
    exact = results(plain_losses, torch.float64)
    found = errors(results(linear_cross_entropy, torch.float32, autocast), exact)
    assert recent == [(320, 5), (320, D)] * 3  # the gradients of table and head, by every chunk
    monkeypatch.undo()
    on_cpu = errors(results(linear_cross_entropy, torch.float32, autocast), exact)
    assert all(ours <= min(3 * plain, most) for ours, plain in zip(found, on_cpu, strict=True))


def test_the_gradient_of_the_head_is_not_rounded_between_chunks(aligned, recent, monkeypatch):
    """Against the same rounded gradients of logits, summed in float64."""
    of_chunks = []

    def gradient(rows, *others):
        found = plain(rows, *others)
        of_chunks.append((found[0].to(torch.bfloat16).double(), rows.to(torch.bfloat16).double()))
        return found

    plain = fused._gradient
    monkeypatch.setattr(fused, "_gradient", gradient)
    x, weight, targets, _ = head_inputs(torch.float32)

    def error_of_head():
        of_chunks.clear()
        with torch.autocast("cpu", torch.bfloat16):
            losses = linear_cross_entropy(x, weight, targets)
        found = torch.autograd.grad(losses.sum(), weight)[0]
        return errors([found], [sum(d.T @ rows for d, rows in of_chunks)[:VOCAB]])[0]

    assert error_of_head() < 1e-6
    monkeypatch.setattr(fused, "is_recent_cuda", lambda device: False)
    assert error_of_head() > 1e-4


def test_torch_takes_the_product_that_adds_in_float32():
    """On tensors of CUDA without values; the second form is the one of compiled functions."""
    with FakeTensorMode():
        total = torch.zeros(320, D, device="cuda")
        a, b = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for shape in ((320, 16), (16, D)))
        for sum_of in (torch.addmm(total, a, b, out_dtype=torch.float32), torch.mm(a, b, out_dtype=torch.float32)):
            assert (sum_of.shape, sum_of.dtype) == (total.shape, torch.float32)


# ---- graphs ----------------------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("aligned")
def test_the_whole_loss_is_one_graph_forward_and_backward():
    torch._dynamo.reset()
    x, weight, targets, scale, evidence = leaves_of()
    run = torch.compile(partial(linear_cross_entropy, scale=scale, evidence=evidence), backend="aot_eager",
                        fullgraph=True)
    theirs = plain_losses(x, weight, targets, scale, evidence)
    ours = run(x, weight, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    same_gradients(ours, theirs, [x, weight, scale, *evidence])


def test_nothing_is_compiled_for_a_cpu():
    assert fused_on_cuda.on_device(fused._losses, CPU) is fused._losses


@pytest.fixture
def device(monkeypatch):
    """The CPU as a recent CUDA device with triton, without what earlier tests compiled."""
    monkeypatch.setattr(fused_on_cuda, "is_recent_cuda", lambda device: True)
    monkeypatch.setattr(fused_on_cuda.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(fused_on_cuda, "warned", set())
    fused_on_cuda._compiled.cache_clear()
    torch._dynamo.reset()
    yield CPU
    fused_on_cuda._compiled.cache_clear()


def broken_compiler(graph, inputs):
    raise RuntimeError("Failed to find C compiler")


def square(x):
    return x.square()


def test_a_machine_without_a_compiler_says_so_once_and_computes(device, monkeypatch):
    monkeypatch.setattr(fused_on_cuda.torch, "compile", partial(torch.compile, backend=broken_compiler))
    with pytest.warns(UserWarning, match="square cannot be compiled.*a C compiler"):
        assert fused_on_cuda.on_device(square, device)(torch.tensor(3.0)) == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_on_cuda.on_device(square, device)(torch.tensor(4.0)) == 16


def test_an_error_of_the_function_itself_is_not_swallowed(device, monkeypatch):
    def wrong(x):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fused_on_cuda.torch, "compile", lambda function: function)
    with pytest.raises(torch.OutOfMemoryError):
        fused_on_cuda.on_device(wrong, device)(torch.zeros(2))


# ---- traffic ---------------------------------------------------------------------------------------------------------

ROWS, MANY, WIDTH = 4096, 4096, 128


def large(with_evidence):
    x, weight = draw(1, ROWS, WIDTH, dtype=torch.float32), draw(MANY, WIDTH, seed=1, dtype=torch.float32)
    targets = torch.randint(0, MANY, (1, ROWS), generator=torch.Generator().manual_seed(2))
    evidence = (draw(1, ROWS, 16, seed=3, dtype=torch.float32), draw(MANY, 16, seed=4, dtype=torch.float32))
    return x, weight, targets, evidence if with_evidence else None


def bytes_a_logit(with_evidence):
    """Bytes that kernels read and write in a training step under bf16 autocast, by logit; compiled ones excepted."""
    x, weight, targets, evidence = large(with_evidence)
    with Traffic() as seen:
        with torch.autocast("cpu", torch.bfloat16):
            losses = linear_cross_entropy(x, weight, targets, evidence=evidence)
        losses.sum().backward()
    return seen.bytes / ROWS / MANY


@pytest.fixture
def as_cuda(monkeypatch, recent):
    monkeypatch.setitem(fused.CHUNKING, "cpu", fused.CHUNKING["cuda"])


@pytest.fixture
def counted(monkeypatch):
    """Chunks are compiled by Inductor, which counts in `torch._inductor.metrics` what its kernels read and write."""
    from torch._inductor import compile_fx, metrics

    def on_device(function, device):
        fast = torch.compile(function, fullgraph=True)

        def run(*args):
            with _disable_current_modes():
                return fast(*args)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(fused, "on_device", on_device)
    monkeypatch.setattr(compile_fx, "inductor_metrics_log", Mock(), raising=False)
    metrics.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield metrics


@pytest.mark.slow
@pytest.mark.usefixtures("as_cuda")
@pytest.mark.parametrize(("with_evidence", "most"), [(False, 18), (True, 39)], ids=["plain", "evidence"])
def test_compiled_chunks_read_and_write_few_bytes_a_logit(counted, with_evidence, most):
    """Logits in bf16 are written and read, and in backward their gradients too, which two products read: 14. Evidence
    adds its float32 product, written and read twice, and two products that read the gradients: 34. The rest is tables
    and rows, which falls with the number of rows, and a second pass for the log-sum-exp."""
    around = bytes_a_logit(with_evidence)
    chunks = counted.num_bytes_accessed / ROWS / MANY
    assert chunks > (18 if with_evidence else 8)
    assert around + chunks < most, around + chunks


@pytest.mark.usefixtures("as_cuda")
@pytest.mark.parametrize(("with_evidence", "most"), [(False, 94), (True, 134)], ids=["plain", "evidence"])
def test_uncompiled_chunks_read_and_write_several_times_as_much(with_evidence, most):
    assert 0.9 * most < bytes_a_logit(with_evidence) < most
