"""Our language model against Huginn's public code, which nobody here wrote.

The figures come from `recpre/raven_modeling_minimal.py` of github.com/seal-rg/recurrent-pretraining at commit
59e0b69b2d96a59cbbe79c9d5034d89ecb5ab6f6, run in float64: its casts to float32 (norm, rotation, angles, logits) read
float64, its attention biases `qk_bias` stay at zero, where they start (ours has none). Its weights are those of `build`
below: Wqkv is q, k, v one below the other, and as it rotates neighbouring coordinates where ours rotates the two halves
of a head, rows 2i and 2i + 1 of a head's q and k there are our rows i and i + K/2. The rotary base is 16^4, near
Huginn's 50,000, so that the frequencies 1, 1/16, 1/256, 1/4096 are exact in float32, too. When the figures were
recorded, the largest difference between any two logits was 5e-15, 1e-14, 1e-14, 5e-14 at 1, 2, 4, 8 steps and 2e-12 at
32; that of any two entries of the gradient 8e-15.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from looped.config.model import ModelConfig
from looped.models.language import LanguageModel, Structure

WIDTH, VOCAB = 32, 64
SIZES = {"width": WIDTH, "num_heads": 4, "ffn_width": 48, "num_prelude_layers": 2, "num_core_layers": 2,
         "num_coda_layers": 1, "rope_base": 65536.0}
HUGINN = {**SIZES, "block": "sandwich", "injection": "linear", "norm_eps": 1e-6, "tie_embeddings": True}

PLACES = (0, 0, 1, 1), (0, 5, 7, 11), (0, 17, 40, 63)
"""Sequence, position and token of the logits below."""
LOGITS = {  # steps -> the logits there; the sum and the sum of squares of all 2 x 12 x 64
    1: ((-0.07175572652715108, 0.5248358875311961, 0.5348742185551262, 0.42542710507215914),
        -168.2066175426419, 1609.3419166163862),
    2: ((0.5136915038040364, 0.33639794492690833, -0.9613154877176574, 0.30409270825354795),
        -91.30668327727082, 1742.8745122576051),
    4: ((0.8612544679987236, 0.6580775267954548, 0.2573073651650411, 0.6365016982145434),
        110.49381728667501, 1615.5227461660083),
    8: ((0.7429405310031014, 0.6803365167435211, -0.4206814001469589, -0.8548985285020949),
        16.974216358244746, 1669.133062581489),
}
LOSS = 5.072035927689622
"""Mean cross-entropy with each token's successor as the target after 2 steps without gradient and 3 with it."""
GRADIENT_NORMS = {"embed": 3.501217411417643, "injection": 4.77226258540562, "norm": 0.48355183464575013,
                  "prelude": 5.490290448611247, "core": 5.915711931719244, "coda": 2.3838259921003915}
INIT_STDS = {"embed": 0.05514, "mix": 0.05519, "q": 0.05511, "k": 0.05514, "v": 0.05512, "attn.out": 0.007494,
             "in_.gate": 0.05518, "in_.up": 0.05518, "mlp.out": 0.007506}
"""Measured on 60 draws a kind of the training code, `recpre/init.py` at that commit: strategy takase, width 128, FFN
320, effective depth 27. (The model file, for inference, starts the half in_.up at the scale of mlp.out.)"""


def draws(seed: int, *shape: int) -> Tensor:
    """Numbers of variance 1 that look random: a quadratic in the index, modulo a prime. Integers, so exact anywhere."""
    i = torch.arange(math.prod(shape))
    u = (7919 * i * (i + 1009 * seed + 1) + 101 * seed) % 10_007
    return ((2 * u - 10_006).double() / 10_007 * math.sqrt(3)).reshape(shape)


TOKENS = (5 + torch.arange(24) * (7 * torch.arange(24) + 3)).reshape(2, 12) % VOCAB
STATE = math.sqrt(2 / 5) * draws(999, 2, 12, WIDTH)


def layers(model: LanguageModel) -> list[nn.Module]:
    return [*model.prelude, *model.recurrence.core.blocks[0].layers, *model.coda]


def parts(model: LanguageModel) -> list[nn.Parameter]:
    """The parameters in the order that gives each its seed."""
    listed = [model.embed.weight, model.recurrence.core.blocks[0].injection.mix.weight, model.norm.weight]
    for layer in layers(model):
        modules = [layer.attn.q, layer.attn.k, layer.attn.v, layer.attn.out, layer.mlp.in_, layer.mlp.out,
                   layer.n1, layer.n2, layer.n3, layer.n4]
        listed += [module.weight for module in modules if not isinstance(module, nn.Identity)]
    return listed


def build(**changes) -> LanguageModel:
    model = LanguageModel(ModelConfig(**{**HUGINN, "state_init": "noise", **changes}), VOCAB).double()
    assert len(parts(model)) == len(list(model.parameters()))
    for seed, weight in enumerate(parts(model)):
        values = draws(seed, *weight.shape)
        weight.data.copy_(1 + values / 4 if weight.ndim == 1 else values / math.sqrt(weight.shape[1]))
    return model


def logits(model: LanguageModel, num_steps: int) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, num_steps, noise=STATE)


def figures(logits: Tensor) -> list[float]:
    return [*logits[PLACES].tolist(), logits.sum().item(), logits.square().sum().item()]


def recorded(num_steps: int):
    some, total, squares = LOGITS[num_steps]
    return pytest.approx([*some, total, squares], rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("num_steps", LOGITS)
def test_logits_are_huginns_at_every_depth(num_steps):
    assert figures(logits(build(), num_steps)) == recorded(num_steps)


def test_loss_and_gradients_of_truncated_bptt_are_huginns():
    loss, norms = loss_and_gradient_norms(no_grad=2, grad=3)
    assert loss == pytest.approx(LOSS, rel=1e-10)
    assert norms == pytest.approx(GRADIENT_NORMS, rel=1e-10)


def test_another_truncation_has_the_same_loss_and_other_gradients():
    """Positive control."""
    loss, norms = loss_and_gradient_norms(no_grad=1, grad=4)
    assert loss == pytest.approx(LOSS, rel=1e-10)
    assert norms != pytest.approx(GRADIENT_NORMS, rel=1e-3)


def loss_and_gradient_norms(**depths: int) -> tuple[float, dict[str, float]]:
    model = build()
    state = model.unroll(model.encode(TOKENS), state=STATE, **depths)
    loss = nn.functional.cross_entropy(model.decode(state).flatten(0, 1), TOKENS.roll(-1, 1).flatten())
    loss.backward()
    core = model.recurrence.core.blocks[0]
    groups = {"embed": model.embed, "injection": core.injection, "norm": model.norm, "prelude": model.prelude,
              "core": core.layers, "coda": model.coda}
    return loss.item(), {name: math.sqrt(sum(p.grad.square().sum().item() for p in part.parameters()))
                         for name, part in groups.items()}


def input_first(model):
    mix = model.recurrence.core.blocks[0].injection.mix
    mix.weight.data = mix.weight.data.roll(WIDTH, dims=1)


def gate_last(model):
    for layer in layers(model):
        layer.mlp.in_.weight.data = layer.mlp.in_.weight.data.roll(SIZES["ffn_width"], dims=0)


def rotate_neighbours(model):
    dim = WIDTH // SIZES["num_heads"]
    order = torch.arange(WIDTH).reshape(-1, dim // 2, 2).mT.flatten()  # 0 2 4 6 1 3 5 7 in each head
    for layer in layers(model):
        for projection in (layer.attn.q, layer.attn.k):
            projection.weight.data = projection.weight.data[order]


def embedding_unscaled(model):
    model.embed.register_forward_hook(lambda module, args, out: out / math.sqrt(WIDTH))


def no_norm_after_the_loop(model):
    calls = iter(range(2))
    model.norm.register_forward_hook(lambda module, args, out: out if next(calls) else args[0])


def norms_exchanged(model):
    for layer in layers(model):
        layer.n2, layer.n3 = layer.n3, layer.n2


EDITS = [input_first, gate_last, rotate_neighbours, embedding_unscaled, no_norm_after_the_loop, norms_exchanged]


@pytest.mark.parametrize("edit", EDITS)
def test_another_structure_does_not_agree(edit):
    """Positive controls: each detail of the structure is seen by the figures, at one step and at eight."""
    for num_steps in (1, 8):
        model = build()
        edit(model)
        edited = logits(model, num_steps)
        assert figures(edited) != recorded(num_steps)
        assert (edited - logits(build(), num_steps)).abs().max() > 0.1


@pytest.mark.parametrize("changes", [{"block": "prenorm"}, {"norm_eps": 1e-5}, {"rope_base": 10_000.0}])
def test_another_setting_does_not_agree(changes):
    assert figures(logits(build(**changes), 4)) != recorded(4)


def test_initial_weights_have_huginns_scales():
    torch.manual_seed(0)
    config = ModelConfig(**{**HUGINN, "width": 128, "ffn_width": 320, "num_core_layers": 3})
    model = LanguageModel(config, 1000, Structure(effective_depth=2 + 1 + 3 * 8))
    weights = {"embed": [model.embed.weight], "mix": [model.recurrence.core.blocks[0].injection.mix.weight]}
    for layer in layers(model):
        gate, up = layer.mlp.in_.weight.chunk(2)
        for name, weight in {"q": layer.attn.q.weight, "k": layer.attn.k.weight, "v": layer.attn.v.weight,
                             "attn.out": layer.attn.out.weight, "in_.gate": gate, "in_.up": up,
                             "mlp.out": layer.mlp.out.weight}.items():
            weights.setdefault(name, []).append(weight)
    stds = {name: torch.stack(many).std().item() for name, many in weights.items()}
    assert stds == pytest.approx(INIT_STDS, rel=0.02)
