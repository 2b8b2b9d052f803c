"""Options of the model that families from elsewhere need: each family's own class, with random weights, gives the same
logits in float64; what transformers has no class for is held against its equations."""

import pickle

import pytest
import torch

from looped.config import load_config
from looped.config.model_families import PRESETS
from looped.errors import UserError
from looped.models.build import build
from looped.nn.layers import TransformerLayer

transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, HEADS, HIDDEN, LAYERS = 60, 32, 4, 48, 4
SIZES = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": HIDDEN,
         "num_hidden_layers": LAYERS, "max_position_embeddings": 128, "pad_token_id": None}
PLAIN = {"objective": "full", "recurrence.mean": 1, "model.width": WIDTH, "model.num_heads": HEADS,
         "model.ffn_width": HIDDEN, "model.num_prelude_layers": 1, "model.num_core_layers": 2,
         "model.num_coda_layers": 1, "model.injection": "none", "model.state_init": "embedding",
         "model.loop_norm": "none", "model.embed_scale": 1.0, "model.tie_embeddings": False}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "Llama": ({}, {}),
    "Llama, tied": ({"tie_word_embeddings": True}, {"model.tie_embeddings": True}),
    "Llama, llama3": ({"rope_parameters": LLAMA3}, {
        "model.rope_base": 500000.0, "model.rope_scaling": {"kind": "llama3", "original_length": 32}}),
    "Llama, linear": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
                      {"model.rope_scaling": {"kind": "linear", "factor": 4.0}}),
    "Llama, yarn": ({"rope_parameters": YARN}, {
        "model.rope_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 32}}),
    "Llama, yarn of its own": (
        {"head_dim": 64, "rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 0.9,
                                                    "truncate": False}},
        {"model.head_dim": 64, "model.rope_scaling": {
            "kind": "yarn", "factor": 4.0, "original_length": 32, "beta_fast": 8.0, "beta_slow": 0.5,
            "attention_factor": 0.9, "truncate": False}}),
    "Llama, head_dim": ({"head_dim": 16}, {"model.head_dim": 16}),
    "Mistral": ({"num_key_value_heads": 2, "sliding_window": None}, {"model.num_kv_heads": 2}),
    "Qwen2": ({"num_key_value_heads": 2}, {"model.num_kv_heads": 2, "model.attention_bias": "qkv"}),
    "Qwen3": ({"head_dim": 16, "num_key_value_heads": 2}, {
        "model.num_kv_heads": 2, "model.qk_norm": True, "model.head_dim": 16}),
    "Olmo2": ({"rms_norm_eps": 1e-5}, {"model.norm_eps": 1e-5, "model.block": "postnorm", "model.qk_norm": "whole"}),
    "SmolLM3": ({"no_rope_layer_interval": 3, "use_cache": False}, {
        "model.nope_interval": 3, "model.rope_base": 2e6})}
LAYER = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj"}


def theirs_of(name, settings):
    family = name.split(",")[0]
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    with torch.no_grad():  # gains and biases too, which are ones and zeros at first
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ours_with(weights, settings):
    """A model of this package with the weights of a stack of layers, cut into prelude, core and coda."""
    model = build(load_config(None, PLAIN | settings), VOCAB).double().eval()
    layers = [*model.prelude, *model.recurrence.core.blocks[0].layers, *model.coda]
    found = {"embed.weight": weights["model.embed_tokens.weight"], "norm.weight": weights["model.norm.weight"]}
    if model.head is not None:
        found["head.weight"] = weights["lm_head.weight"]
    names = {id(module): name for name, module in model.named_modules()}
    for number, layer in enumerate(layers):
        own = {key.removeprefix(f"model.layers.{number}."): value for key, value in weights.items()
               if key.startswith(f"model.layers.{number}.")}
        post = "post_feedforward_layernorm.weight" in own
        norms = {"n2": "post_attention_layernorm", "n4": "post_feedforward_layernorm"} if post else {
            "n1": "input_layernorm", "n3": "post_attention_layernorm"}
        part = {f"{norm}.weight": own.pop(f"{key}.weight") for norm, key in norms.items()}
        part["mlp.in_.weight"] = torch.cat([own.pop("mlp.gate_proj.weight"), own.pop("mlp.up_proj.weight")])
        part["mlp.out.weight"] = own.pop("mlp.down_proj.weight")
        for ours, key in LAYER.items():
            for kind in ("weight", "bias"):
                if f"{key}.{kind}" in own:
                    part[f"attn.{ours}.{kind}"] = own.pop(f"{key}.{kind}")
        for norm in ("q_norm", "k_norm"):
            if f"self_attn.{norm}.weight" in own:
                part[f"attn.{norm}.weight"] = own.pop(f"self_attn.{norm}.weight")
        assert not own  # every weight has its place
        found |= {f"{names[id(layer)]}.{key}": value for key, value in part.items()}
    missing, surplus = model.load_state_dict(found, strict=False)
    assert not missing
    assert not surplus
    return model


def tokens(length=40):
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_layers_are_those_of_its_own_class(name):
    """To 1e-6: rotary angles are worked out in float32 here as there."""
    settings, options = FAMILIES[name]
    theirs = theirs_of(name, settings)
    ours = ours_with(theirs.state_dict(), options)
    with torch.no_grad():
        expected = theirs(tokens(), use_cache=False).logits
        assert expected.std() > 0.01
        torch.testing.assert_close(ours(tokens(), 1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Llama, llama3", "Llama, yarn", "Qwen2", "Qwen3", "Olmo2", "SmolLM3"])
def test_each_option_is_needed(name):
    """Positive control: without it the same weights, as far as they have a place, give other logits."""
    settings, options = FAMILIES[name]
    left_out = {"Llama, llama3": "model.rope_scaling", "Llama, yarn": "model.rope_scaling",
                "Qwen2": "model.attention_bias", "Qwen3": "model.qk_norm", "Olmo2": "model.qk_norm",
                "SmolLM3": "model.nope_interval"}[name]
    theirs = theirs_of(name, settings)
    ours, without = ours_with(theirs.state_dict(), options), build(
        load_config(None, PLAIN | {key: value for key, value in options.items() if key != left_out}), VOCAB).double()
    without.load_state_dict(ours.state_dict(), strict=False)
    with torch.no_grad():
        assert (without(tokens(), 1) - ours(tokens(), 1)).abs().max() > 1e-4


def theirs_by_yarn(head_dim, base, **settings):
    """Frequencies and the factor of cos and sin, by transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length = settings["original_max_position_embeddings"]
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=4 * length,
        rope_parameters={"rope_type": "yarn", "rope_theta": base, **settings})
    return ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")


NAMES_HERE = {"original_max_position_embeddings": "original_length"}


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("head_dim", "base", "length", "others"), [
    (128, 1e6, 32768, {}), (64, 1e4, 2048, {"factor": 16.0}), (64, 1e4, 4096, {"attention_factor": 0.5}),
    (8, 1e4, 32, {}), (8, 5e5, 4, {}), (16, 100.0, 10**6, {"factor": 0.5}), (32, 1e4, 64, {
        "beta_fast": 2.0, "beta_slow": 2.0})])
def test_yarns_frequencies_are_those_of_transformers(head_dim, base, length, others, truncate):
    """To float32, in which transformers works them out; also where the ramp has no length or lies beyond either end."""
    settings = {"factor": 4.0, "original_max_position_embeddings": length, "truncate": truncate} | others
    expected, gain = theirs_by_yarn(head_dim, base, **settings)
    rotary = build(load_config(None, PLAIN | {
        "model.head_dim": head_dim, "model.rope_base": base, "model.rope_scaling": {
            "kind": "yarn", **{NAMES_HERE.get(name, name): value for name, value in settings.items()}}}), VOCAB).rotary
    torch.testing.assert_close(rotary.frequencies, expected, rtol=2e-6, atol=0)
    cos, sin = rotary(torch.arange(5))
    assert rotary.gain == pytest.approx(gain, rel=1e-12)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, gain))


def test_a_norm_after_each_pass_and_on_each_branch_are_ouros():
    """h = E[x]; each pass: x + n2(attn(n1 x)), x + n4(mlp(n3 x)) through all layers, then the norm; the head on it."""
    model = build(load_config(None, PLAIN | {
        "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.block": "branch",
        "model.loop_norm": "each-pass"}), VOCAB).double().eval()
    block = model.recurrence.core.blocks[0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        state = model.embed(tokens())
        rows = model.placed(state, looped_rows())
        for passes in (1, 2, 4):
            state = model.embed(tokens())
            for _ in range(passes):
                for layer in block.layers:
                    state = state + layer.n2(layer.attn(layer.n1(state), rows))
                    state = state + layer.n4(layer.mlp(layer.n3(state)))
                state = block.norm(state)
            torch.testing.assert_close(model(tokens(), passes), state @ model.head.weight.T, rtol=1e-12, atol=1e-12)
    assert not list(model.norm.parameters())


def looped_rows():
    from looped.nn.rows import PLAIN as ROWS

    return ROWS


def test_a_norm_after_each_pass_is_not_the_last_one_before_a_coda():
    model = build(load_config(None, PLAIN | {"model.loop_norm": "each-pass"}), VOCAB)
    names = [name for name, _ in model.named_parameters() if name.endswith("norm.weight")]
    assert names == ["recurrence.core.blocks.0.norm.weight", "norm.weight"]


def test_a_random_state_has_the_standard_deviation_that_is_set():
    """Of like-init the normal distribution is cut at three standard deviations."""
    noise = torch.randn(4, 2000, WIDTH, generator=torch.Generator().manual_seed(0))
    for start, share in (("like-init", 0.9866), ("noise", 1.0)):
        model = build(load_config(None, PLAIN | {"model.state_init": start, "model.state_std": 0.0087}), VOCAB)
        assert model.initial_state(noise, noise).std().item() == pytest.approx(0.0087 * share, rel=0.01)
        plain = build(load_config(None, PLAIN | {"model.state_init": start}), VOCAB).initial_state(noise, noise)
        torch.testing.assert_close(model.initial_state(noise, noise) / 0.0087, plain / {
            "like-init": 0.4**0.5, "noise": 1.0}[start])


@pytest.mark.parametrize(("settings", "why"), [
    ({"model.head_dim": 15}, "head_dim 15 is odd"),
    ({"model.block": "postnorm", "objective": "denoise", "denoise.context": "inject"},
     "block postnorm has no norm before its branches for the level to modulate; choose branch"),
    ({"model.rope_scaling": {"kind": "yarm"}}, "rope_scaling.kind"),
    ({"model.rope_scaling": {"kind": "yarn", "beta_fast": 1, "beta_slow": 32}}, "beta_fast 1 is below beta_slow 32"),
    ({"model.rope_scaling": {"kind": "yarn"}, "model.rope_base": 1.0}, "rope_base 1 gives none below the first")])
def test_what_does_not_go_together_is_a_sentence(settings, why):
    with pytest.raises(UserError, match=why):
        build(load_config(None, PLAIN | settings), VOCAB)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_settings_in_a_file_and_as_a_flag(name, tmp_path):
    """A setting beside it wins; a flag wins over a file; the dump holds the settings alone."""
    (tmp_path / "c.yaml").write_text(f"model: {{preset: {name}, num_core_layers: 3, rope_base: 7.0}}")
    config = load_config(tmp_path / "c.yaml")
    expected = PRESETS[name] | {"num_core_layers": 3, "rope_base": 7.0}
    assert {key: getattr(config.model, key) for key in expected} == expected
    assert config.model.preset is None
    (tmp_path / "c.yaml").write_text("model: {rope_base: 7.0, num_core_layers: 5, embed_scale: 3.0}")
    flags = {"model.preset": name, "model.num_core_layers": 3}
    for found in (load_config(tmp_path / "c.yaml", flags), load_config(None).replace(**flags)):
        expected = PRESETS[name] | {"num_core_layers": 3}
        assert {key: getattr(found.model, key) for key in expected} == expected
    build(load_config(None, {"objective": "full", **flags}), VOCAB)


def test_an_unknown_preset_is_named():
    with pytest.raises(UserError, match=r"preset 'ouroo' is unknown; did you mean 'ouro'"):
        load_config(None, {"model.preset": "ouroo"})


def test_a_layers_bias_is_one_of_three():
    with pytest.raises(UserError, match="bias 'all' is unknown; known names: none, qk, qkv"):
        TransformerLayer(8, 2, 12, bias="all")


@pytest.mark.parametrize("settings", [options for _, options in FAMILIES.values()], ids=list(FAMILIES))
def test_it_trains_and_writes_with_every_option(settings):
    """A cache gives what the whole text gives, and every weight has a gradient."""
    from looped.inference.generate import generate
    from looped.objectives import build_objective
    from looped.rng import StepRandom

    config = load_config(None, PLAIN | settings | {"objective": "truncated", "recurrence.mean": 2,
                                                   "model.injection": "linear"})
    objective = build_objective(config, build(config, VOCAB)).double()
    objective(tokens(), StepRandom(0, 0, count=2)).value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())
    written = generate(objective, tokens(6), num_tokens=4, depth=2, temperature=1e-6)
    whole = tokens(6)
    for _ in range(4):
        logits = objective.model(whole, 2)
        whole = torch.cat([whole, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, whole[:, 6:])


@pytest.mark.parametrize("name", ["Llama, llama3", "Llama, linear"])
def test_a_model_with_scaled_positions_is_pickled(name):
    model = build(load_config(None, PLAIN | FAMILIES[name][1]), VOCAB)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(tokens(), 1), model(tokens(), 1))
