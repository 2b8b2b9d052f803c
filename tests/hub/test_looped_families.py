"""Folders of models that were published looped, in their layouts, against their equations in float64, and for Retrofit
against transformers' own layers; tables of names there and back, of every family."""

import math

import pytest
import torch
from looped_folders import (
    DIM,
    HEADS,
    LENGTH,
    PLACES,
    RETROFIT,
    STD,
    VARIANTS,
    VOCAB,
    WIDTH,
    draw,
    huginn,
    ouro,
    retrofit,
)
from test_pretrained import SAVED, change, cut_logits, rewrite, saved, tokens

from looped.data.batch import Batch
from looped.errors import UserError
from looped.hub.families import open_pretrained, read_pretrained
from looped.hub.families.base import Link
from looped.hub.families.huginn import Huginn, halves
from looped.hub.families.retrofit import Retrofit
from looped.inference.exits import Exit
from looped.inference.rollout import answer
from looped.objectives import build_objective

safetensors = pytest.importorskip("safetensors.torch")

def norm(x, gain):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain


def causal(q, k, v):
    """(B, L, H, K) of queries, fewer heads of keys and values."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) / DIM**0.5
    scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), v).flatten(2)


def as_complex(x, base):
    """Neighbours as one complex number, turned by its angle."""
    angles = torch.outer(torch.arange(LENGTH), base ** (-torch.arange(0, DIM, 2).double() / DIM))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(()).double(), angles)[:, None]
    return torch.view_as_real(pairs).flatten(-2)


def huginn_layer(x, own, raw):
    """n2(x + attn(n1 x)), n4(x + mlp(n3 x))."""
    keys = raw["num_key_value_heads"] * DIM
    qkv = norm(x, own["norm_1.weight"]) @ own["attn.Wqkv.weight"].T
    q, k, v = (part.unflatten(-1, (-1, DIM)) for part in qkv.split([WIDTH, keys, keys], -1))
    if raw["qk_bias"]:
        q, k = q + own["attn.qk_bias"][0], k + own["attn.qk_bias"][1]
    q, k = (as_complex(part, raw["rope_base"]) for part in (q, k))
    x = norm(x + causal(q, k, v) @ own["attn.proj.weight"].T, own["norm_2.weight"])
    gate, up = (norm(x, own["norm_3.weight"]) @ own["mlp.fc.weight"].T).chunk(2, -1)
    mixed = (torch.nn.functional.silu(gate) * up) @ own["mlp.proj.weight"].T
    return norm(x + mixed, own["norm_4.weight"])


def huginn_logits(raw, tensors, num_steps, state):
    def through(part, x):
        for i in PLACES[part]:
            prefix = f"transformer.{part}.{i}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            x = huginn_layer(x, own, raw)
        return x

    gain, table = tensors["transformer.ln_f.weight"], tensors["transformer.wte.weight"]
    e = through("prelude", WIDTH**0.5 * table[tokens()])
    for _ in range(num_steps):
        if raw["injection_type"] == "add":
            state = through("core_block", state + e)
        else:
            state = through("core_block", torch.cat([state, e], -1) @ tensors["transformer.adapter.weight"].T)
    return norm(through("coda", norm(state, gain)), gain) @ tensors.get("lm_head.weight", table).T


@torch.no_grad()
def logits(model, num_steps, state):
    model = model.double()
    return model.decode(model.unroll(model.encode(tokens()), grad=num_steps, state=state))


def state_of():
    return draw(7)(2, LENGTH, WIDTH, scale=0.6).double()


def cut_normal(noise):
    """Normal draws as draws of the normal distribution cut at three standard deviations."""
    low = torch.special.ndtr(torch.tensor(-3.0).double())
    return torch.special.ndtri(low + (1 - 2 * low) * torch.special.ndtr(noise))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_huginn_is_its_equations(variant, num_steps, tmp_path):
    """To 5e-6: angles are worked out in float32 here, as there."""
    raw, tensors = huginn(tmp_path, variant)
    ours, config = read_pretrained(tmp_path)
    noise = draw(7)(2, LENGTH, WIDTH).double()
    expected = huginn_logits(raw, tensors, num_steps, math.sqrt(2 / 5) * cut_normal(noise))
    assert expected.std() > 0.3
    with torch.no_grad():
        found = ours.double()(tokens(), num_steps, noise=noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    recurrence = config.recurrence
    assert (config.objective, recurrence.mean, recurrence.backprop, recurrence.distribution) == (
        "truncated", 32, 8, "huginn")
    assert config.model.state_std is None


@pytest.mark.parametrize("left_out", ["of biases", "of rows"])
def test_huginns_pairs_have_to_be_put_apart(left_out, tmp_path, monkeypatch):
    """Positive control: in their own order biases, or rows, give other logits."""
    raw, tensors = huginn(tmp_path)

    def layer(self, raw, ours, theirs):
        links = kept(self, raw, ours, theirs)
        turned = [link for link in links if ("bias" in link.ours[0]) == (left_out == "of biases")]
        return [Link(link.ours, link.theirs, None, link.shape) if link in turned else link for link in links]

    kept = Huginn.layer
    monkeypatch.setattr(Huginn, "layer", layer)
    ours, _ = read_pretrained(tmp_path)
    assert (logits(ours, 4, state_of()) - huginn_logits(raw, tensors, 4, state_of())).abs().max() > 1e-2


def test_halves_are_pairs_of_neighbours_put_apart():
    assert halves(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("family", ["huginn", "retrofit"])
def test_the_first_state_is_the_familys(family, tmp_path):
    """Normal, cut at three standard deviations: sqrt(2 / 5) of any width, and Huginn's own std without its scale."""
    huginn(tmp_path) if family == "huginn" else retrofit(tmp_path)
    noise = torch.randn(4, 1000, WIDTH, generator=torch.Generator().manual_seed(0))
    found = read_pretrained(tmp_path)[0].initial_state(noise, noise)
    std = {"huginn": math.sqrt(2 / 5), "retrofit": STD}[family]
    torch.testing.assert_close(found.double(), std * cut_normal(noise.double()), rtol=1e-4, atol=1e-6 * std)
    assert pytest.approx(0.008703882797784892, rel=1e-12) == STD


DONORS = ("Llama", "Llama, llama3", "Olmo2")


@pytest.mark.parametrize("donor", DONORS)
@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_an_untrained_retrofit_is_its_donor_cut(donor, num_steps, tmp_path):
    theirs = retrofit(tmp_path, donor).double()
    ours, config = read_pretrained(tmp_path)
    torch.testing.assert_close(logits(ours, num_steps, state_of()), cut_logits(theirs, [0, 1, 3, 4, 5]), rtol=0,
                               atol=5e-6)
    assert (config.objective, config.recurrence.mean, config.model.injection) == ("truncated", 32, "linear")


@torch.no_grad()
def retrofit_logits(theirs, adapter, num_steps, state):
    """The donor's layers around an adapter, run by transformers: E[x], layers 0 1, (adapter [s; e], layers 3 4) again
    and again, layer 5, norm, head."""
    inner, place = theirs.model, torch.arange(LENGTH)[None]
    x = inner.embed_tokens(tokens())
    angles, mask = inner.rotary_emb(x, place), torch.full((LENGTH, LENGTH), -torch.inf).double().triu(1)[None, None]

    def through(x, *numbers):
        for number in numbers:
            x = inner.layers[number](x, attention_mask=mask, position_ids=place, position_embeddings=angles)
            x = x[0] if isinstance(x, tuple) else x
        return x

    e = through(x, 0, 1)
    for _ in range(num_steps):
        state = through(torch.cat([state, e], -1) @ adapter.T, 3, 4)
    return theirs.lm_head(inner.norm(through(state, 5)))


@pytest.mark.parametrize("donor", DONORS)
@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_a_trained_retrofit_loops_its_donors_layers(donor, num_steps, tmp_path):
    adapter = draw(3)(WIDTH, 2 * WIDTH, scale=WIDTH**-0.5)
    theirs = retrofit(tmp_path, donor, adapter).double()
    expected = retrofit_logits(theirs, adapter.double(), num_steps, state_of())
    found = logits(read_pretrained(tmp_path)[0], num_steps, state_of())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    other = retrofit_logits(theirs, adapter.double(), num_steps, 0 * state_of())
    assert num_steps > 1 or (other - expected).abs().max() > 1e-3  # the state counts


@pytest.mark.parametrize("wrong", ["base", "pairs"])
def test_a_retrofits_positions_are_its_donors(wrong, tmp_path, monkeypatch):
    """Positive control: by `rope_base`, which is Huginn's, or in pairs of neighbours it is another model."""
    expected = cut_logits(retrofit(tmp_path).double(), [0, 1, 3, 4, 5])
    if wrong == "base":
        change(tmp_path, rope_theta=RETROFIT["rope_base"])
    else:
        monkeypatch.setattr(Retrofit, "rows", Huginn.rows)
    assert (logits(read_pretrained(tmp_path)[0], 1, state_of()) - expected).abs().max() > 1e-2


def test_a_retrofit_may_start_from_the_encoded_input(tmp_path):
    retrofit(tmp_path, initial_state_mode="embed-init")
    _, config = read_pretrained(tmp_path)
    assert (config.model.state_init, config.model.state_std) == ("embedding", None)


def ouro_states(tensors, passes):
    """h = E[x]; each pass: h + n2(attn(n1 h)), h + n4(mlp(n3 h)) through all layers, then the norm."""
    place = torch.arange(LENGTH).double()
    angles = torch.outer(place, 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM))[:, None]
    cos, sin = angles.cos(), angles.sin()

    def turned(x):
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    x = tensors["model.embed_tokens.weight"][tokens()]
    for _ in range(passes):
        for i in range(6):
            own = {name: tensors[f"model.layers.{i}.{name}.weight"] for name in (
                "input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2",
                *(f"self_attn.{part}_proj" for part in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
            h = norm(x, own["input_layernorm"])
            q, k, v = ((h @ own[f"self_attn.{part}_proj"].T).unflatten(-1, (-1, DIM)) for part in "qkv")
            x = x + norm(causal(turned(q), turned(k), v) @ own["self_attn.o_proj"].T, own["input_layernorm_2"])
            h = norm(x, own["post_attention_layernorm"])
            mixed = torch.nn.functional.silu(h @ own["mlp.gate_proj"].T) * (h @ own["mlp.up_proj"].T)
            x = x + norm(mixed @ own["mlp.down_proj"].T, own["post_attention_layernorm_2"])
        x = norm(x, tensors["model.norm.weight"])
    return x


def ouro_logits(tensors, passes):
    """The head on the last state."""
    return ouro_states(tensors, passes) @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_ouro_is_its_equations(passes, tmp_path):
    tensors = ouro(tmp_path, passes)
    ours, config = read_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(tokens(), passes), ouro_logits(tensors, passes), rtol=0, atol=5e-6)
    assert (config.objective, config.main_depth) == ("full", passes)


def leaving(tensors, threshold, passes):
    """The pass after which the last token of each text leaves by the gate: lambda_i = sigmoid(w . h_i + b), p_i =
    lambda_i times (1 - lambda_j) of all j < i, the last pass with the rest; the first whose sum of p reaches it."""
    weight, bias = tensors["model.early_exit_gate.weight"][0], tensors["model.early_exit_gate.bias"][0]
    stays, total, left = torch.ones(2).double(), torch.zeros(2).double(), torch.zeros(2).long()
    for i in range(1, passes + 1):
        state = ouro_states(tensors, i)[:, -1]
        chance = 1 / (1 + torch.exp(-(state @ weight + bias))) if i < passes else torch.ones(2).double()
        total, stays = total + chance * stays, stays * (1 - chance)
        left = torch.where((left == 0) & ((total >= threshold) | (i == passes)), i, left)
    return left.tolist()


def test_ouros_gate_is_read_and_says_when_to_leave(tmp_path):
    """The last token alone is sought, as in writing. Thresholds leave at different passes, or nothing is shown."""
    tensors, passes = ouro(tmp_path), 6
    ours, config = read_pretrained(tmp_path)
    for part in ("weight", "bias"):
        assert torch.equal(getattr(ours.exit_gate, part).double(), tensors[f"model.early_exit_gate.{part}"])
    assert config.model.exit_gate
    last = torch.zeros(2, LENGTH, dtype=torch.bool)
    last[:, -1] = True
    batch, rule = Batch(tokens(), tokens(), last, causal=True), build_objective(config, ours)
    found = {}
    for threshold in (0.0, 0.2, 0.5, 0.8, 0.95, 1.0):
        answered = answer(rule, batch, [passes], config, exit=Exit.parse(f"gate={threshold}"))[passes]
        found[threshold] = answered.used.tolist()
        assert found[threshold] == leaving(tensors, threshold, passes)
        for row, step in enumerate(found[threshold]):
            assert answered.answers[row, -1] == ouro_logits(tensors, step)[row, -1].argmax()
    assert found[0.0] == [1, 1]
    assert found[1.0] == [passes] * 2
    assert len({step for steps in found.values() for step in steps}) > 3


def test_a_threshold_of_ouros_is_said_to_be_that_of_an_exit(tmp_path):
    ouro(tmp_path)
    change(tmp_path, early_exit_threshold=0.5)
    with pytest.warns(UserWarning, match=r"has early_exit_threshold 0.5, .* solved with --exits gate=0.5"):
        read_pretrained(tmp_path)


LOOPED = {"Huginn": huginn, "Huginn, untied": lambda folder: huginn(folder, "untied"), "Retrofit": retrofit,
          "Retrofit, Olmo2": lambda folder: retrofit(folder, "Olmo2"), "Ouro": ouro}


@pytest.mark.parametrize("name", [*SAVED, *LOOPED])
def test_names_go_there_and_back(name, tmp_path):
    """Every tensor that is read is written again, bit for bit; those left over are read past by design."""
    LOOPED[name](tmp_path) if name in LOOPED else saved(tmp_path, name)
    found, theirs = open_pretrained(tmp_path), safetensors.load_file(tmp_path / "model.safetensors")
    ours = dict(found.weights())
    written = {key: tensor for link in found.links for key, tensor in link.write([ours[own] for own in link.ours])}
    for key, tensor in written.items():
        assert torch.equal(tensor, theirs[key]), key
    words = ("freqs_cis", "norm_3", "norm_4")
    left = {key for key in theirs.keys() - written.keys() if not any(word in key for word in words)}
    assert not left
    assert {own for link in found.links for own in link.ours} == ours.keys()


LAST = "transformer.coda.0"
BROKEN = {
    "a tensor is missing": (huginn, lambda f: rewrite(f, lambda t: t.pop(f"{LAST}.attn.qk_bias")),
                            f"has no tensor {LAST}.attn.qk_bias"),
    "a norm is missing": (huginn, lambda f: rewrite(f, lambda t: t.pop(f"{LAST}.norm_4.weight")),
                          f"has no tensor {LAST}.norm_4.weight"),
    "a tensor too many": (huginn, lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(2))), "holds extra, which"),
    "biases of another shape": (huginn, lambda f: rewrite(f, lambda t: t.update({
        f"{LAST}.attn.qk_bias": torch.ones(2, HEADS, DIM)})), r"shape \(2, 4, 8\), but by its config.json it is"),
    "a head of its own": (huginn, lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": torch.ones(VOCAB, 8)})),
                          "holds lm_head.weight, which"),
    "layers that lie": (huginn, lambda f: change(f, n_layers_in_coda=2), "has no tensor transformer.coda.1"),
    "biases that lie": (huginn, lambda f: change(f, qk_bias=False), "holds transformer.coda.0.attn.qk_bias and 4 more"),
    "no number": (huginn, lambda f: change(f, n_layers_in_coda="1"), "its n_layers_in_coda is '1', not a whole number"),
    "no size": (huginn, lambda f: change(f, n_embd=None), "is not a model's config: it has no n_embd"),
    "heads that do not fit": (huginn, lambda f: change(f, n_heads=5, head_dim=6, num_key_value_heads=5),
                              "does not split into num_heads 5"),
    "biases of fewer heads": (huginn, lambda f: change(f, num_key_value_heads=2), "Huginn's biases need equal numbers"),
    "no base": (huginn, lambda f: change(f, rope_base=None), "does not set rope_base"),
    "a bias": (huginn, lambda f: change(f, bias=True), "has bias True, which no model here"),
    "an injection": (huginn, lambda f: change(f, injection_type="ffn"), "injection_type 'ffn', which no model here"),
    "another block": (huginn, lambda f: change(f, block_class_name="TransformerPostNormBlock"), "has block_class_name"),
    "another activation": (huginn, lambda f: change(f, nonlin_name="ReLU2"), "has nonlin_name 'ReLU2'"),
    "noise at every step": (huginn, lambda f: change(f, test_time_noise=0.1), "has test_time_noise 0.1"),
    "marks of both": (huginn, lambda f: change(f, rope_theta=10000.0), "has embed_scale 5.65.* and rope_theta 10000.0"),
    "Huginn unscaled": (huginn, lambda f: change(f, init_values={"embed_scale": 1.0}),
                        "scale 1.0 and rope_theta N"),
    "Retrofit without its base": (retrofit, lambda f: change(f, rope_theta=None), "must be Huginn, with embed_scale"),
    "half an OLMo": (retrofit, lambda f: rewrite(f, lambda t: t.update({f"{LAST}.attn.q_norm.weight": torch.ones(8)})),
                     "has no tensor transformer.prelude.0.attn.q_norm.weight"),
    "Retrofit's tied head": (retrofit, lambda f: rewrite(f, lambda t: t.pop("lm_head.weight")), "no tensor lm_head.w"),
    "another start": (retrofit, lambda f: change(f, initial_state_mode="skip-adapter"), "'skip-adapter', which no"),
    "half a scaling": (retrofit, lambda f: change(f, rope_scaling={"rope_type": "llama3"}), "does not set factor"),
    "an exit by its number": (ouro, lambda f: change(f, early_exit_step=2), "has early_exit_step 2"),
    "no gate": (ouro, lambda f: rewrite(f, lambda t: t.pop("model.early_exit_gate.bias")),
                "has no tensor model.early_exit_gate.bias"),
    "no passes": (ouro, lambda f: change(f, total_ut_steps=None), "does not set total_ut_steps"),
    "a norm of Ouro's": (ouro, lambda f: rewrite(f, lambda t: t.pop("model.layers.5.input_layernorm_2.weight")),
                         "has no tensor model.layers.5.input_layernorm_2.weight"),
    "Ouro as a Llama": (ouro, lambda f: change(f, model_type="llama"), "holds model.early_exit_gate.bias and 13 more")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_looped_folder_that_is_not_what_it_says_is_one_sentence(name, tmp_path):
    make, damage, why = BROKEN[name]
    make(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=why) as error:
        read_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", LOOPED)
def test_what_loops_already_is_not_cut(name, tmp_path):
    LOOPED[name](tmp_path)
    with pytest.raises(UserError, match="has no dense stack to cut; leave it out"):
        read_pretrained(tmp_path, layers="1/1/1")


@pytest.mark.parametrize("name", ["Huginn", "Retrofit", "Retrofit, Olmo2"])
def test_huginn_and_retrofit_are_told_apart(name, tmp_path):
    """They share a model_type; as transformers 5 writes a Retrofit's positions, too."""
    LOOPED[name](tmp_path)
    if "Retrofit" in name:
        change(tmp_path, rope_theta=None, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
    config = read_pretrained(tmp_path)[1].model
    assert (config.block, config.loop_norm, config.embed_scale, config.rope_base) == {
        "Huginn": ("sandwich", "before-coda", None, 50000.0), "Retrofit": ("prenorm", "none", 1.0, 10000.0),
        "Retrofit, Olmo2": ("postnorm", "none", 1.0, 10000.0)}[name]
