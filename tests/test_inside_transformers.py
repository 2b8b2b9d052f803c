"""docs/inside-transformers.md runs, and its loop is the donor: logits, gradients and losses against transformers."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("unchecked")

TEXT = (Path(__file__).parents[1] / "docs" / "inside-transformers.md").read_text()
(SNIPPET,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the snippet after it has run, once, in a folder of its own."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("inside"))
        exec(compile(SNIPPET, "inside-transformers.md", "exec"), names)
    return SimpleNamespace(**names)


def pair(page, dtype=torch.float64):
    """(a donor, a copy of it with a loop in the middle), untrained, and some tokens."""
    torch.manual_seed(1)
    donor = transformers.LlamaForCausalLM(page.config).to(dtype).eval()
    return donor, page.loop_middle(copy.deepcopy(donor), 1, 1, mean=4, backprop=2).to(dtype), torch.randint(32, (3, 9))


@pytest.mark.parametrize("num_steps", [1, 5])
def test_before_training_it_is_the_donor(page, num_steps):
    donor, looped, ids = pair(page)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding on the left: the mask has to reach every step
    for given in ({}, {"attention_mask": mask}):
        torch.testing.assert_close(looped(ids, num_steps=num_steps, **given).logits, donor(ids, **given).logits,
                                   rtol=1e-10, atol=1e-10)
    looped.model.layers[1].loop.core.blocks[0].injection.mix.weight.data += 0.1
    assert (looped(ids, num_steps=num_steps).logits - donor(ids).logits).abs().max() > 1e-3


def test_a_donor_in_bfloat16_is_looped_in_bfloat16(page):
    donor = transformers.LlamaForCausalLM(page.config).to(torch.bfloat16).eval()
    looped = page.loop_middle(copy.deepcopy(donor), 1, 1, mean=4, backprop=2)
    assert {weight.dtype for weight in looped.parameters()} == {torch.bfloat16}
    ids = torch.randint(32, (3, 9))
    torch.testing.assert_close(looped(ids, num_steps=4).logits, donor(ids).logits)


def by_hand(model, ids, no_grad, grad):
    """The logits of an unroll of the donor's own layers, the state cut off after the steps that have no gradient."""
    inner = model.model
    first, middle, last = inner.layers
    block = middle.loop.core.blocks[0]
    e = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    told = {"attention_mask": None, "position_ids": positions, "position_embeddings": inner.rotary_emb(e, positions)}
    e = first(e, **told)
    state = torch.zeros_like(e)
    for step in range(no_grad + grad):
        state = torch.cat([state, e], dim=-1) @ block.injection.mix.weight.T
        for layer in block.layers:
            state = layer(state, **told)
        if step == no_grad - 1:
            state = state.detach()
    return model.lm_head(inner.norm(last(state, **told)))


def gradients(model, logits, ids):
    """Of the loss in float64; transformers rounds the logits of its own to float32."""
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_a_training_step_has_the_gradient_of_its_last_steps_alone(page, monkeypatch):
    _, looped, ids = pair(page)
    looped.model.layers[1].loop.core.blocks[0].injection.mix.weight.data += 0.1 * torch.randn(32, 64)
    monkeypatch.setitem(page.LoopedLayers.forward.__globals__, "sample_depths", lambda *_, **__: (3, 2))
    ours = gradients(looped, looped.train()(ids).logits, ids)
    theirs = gradients(looped, by_hand(looped, ids, 3, 2), ids)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-12)
    whole = gradients(looped, by_hand(looped, ids, 0, 5), ids)
    assert any((whole[name] - gradient).abs().max() > 1e-6 for name, gradient in theirs.items())


def test_the_trainer_of_transformers_trains_it(page):
    losses = [line["loss"] for line in page.trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert list(page.losses) == [1, 2, 4, 8]
    assert max(page.losses.values()) < 0.5 * losses[0]


def test_depths_are_drawn_in_training_alone(page):
    trained = page.model.model.layers[1].trained
    assert trained == page.settings.max_steps
    page.model(page.ids, labels=page.ids)
    assert page.model.model.layers[1].trained == trained


def test_it_comes_back(page):
    with torch.no_grad():
        ours, back = (model(page.ids, num_steps=4).logits for model in (page.model, page.again))
    torch.testing.assert_close(back, ours, rtol=0, atol=0)


def test_a_cache_is_refused(page):
    with pytest.raises(ValueError, match="use_cache=False"):
        page.model(page.ids, use_cache=True)
