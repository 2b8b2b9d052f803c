"""`model.attention` reaches every attention call of a model; on the CPU the backends that run there agree."""

import pytest
import torch

from looped.config import load_config
from looped.data.image_batches import ImageSpec
from looped.models.build import build
from looped.nn import layers
from looped.nn.layers import Attention
from looped.objectives import build_objective
from looped.rng import StepRandom

SMALL = {"model.width": 16, "model.num_heads": 2}
PICTURE = ImageSpec(channels=1, height=8, width=8, patch=4)
KINDS = {"text": ({}, None), "blocks": ({"objective": "full", "blocks.num": 2, "model.num_core_layers": 2}, None),
         "classifier": ({"images.source": "digits", "denoise.context": "inject"}, PICTURE),
         "image denoiser": ({"images.source": "digits", "images.goal": "generate", "denoise.context": "inject",
                             "model.num_prelude_layers": 0, "model.num_coda_layers": 0,
                             "model.injection": "none"}, PICTURE)}


def model_of(kind, attention="auto", **changes):
    settings, picture = KINDS[kind]
    return build(load_config(None, SMALL | settings | {"model.attention": attention} | changes), 20, picture)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_the_backend_of_the_setting(kind):
    found = [module.backend for module in model_of(kind, "cudnn").modules() if isinstance(module, Attention)]
    assert len(found) >= 2
    assert set(found) == {"cudnn"}


@pytest.mark.parametrize("context", ["inject", "concat", "context"])
def test_every_call_is_made_with_the_backend_of_the_setting(context, monkeypatch, unchecked):
    """In a training step of a denoiser, whose context is attended to in all its ways."""
    asked = []
    for name in ("attention", "context_attention"):
        run = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *args, backend, run=run, **rest: asked.append(backend) or run(
            *args, backend="auto", **rest))
    config = load_config(None, SMALL | {"model.attention": "flash", "denoise.context": context})
    objective = build_objective(config, build(config, 20), None)
    objective(torch.arange(18).view(2, 9) % 20, StepRandom(0, 0, count=2)).value.backward()
    assert len(asked) >= 4
    assert set(asked) == {"flash"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_on_the_cpu_auto_is_sdpa_bit_for_bit_and_flex_is_close(unchecked):
    tokens = torch.arange(24).view(2, 12) % 20
    with torch.no_grad():
        auto, sdpa, flex = (model_of("text", name, **{"model.state_init": "zero"})(tokens, 3)
                            for name in ("auto", "sdpa", "flex"))
    assert torch.equal(auto, sdpa)
    torch.testing.assert_close(auto, flex, rtol=1e-4, atol=1e-5)
    assert not torch.equal(auto, flex)  # positive control: something else ran
