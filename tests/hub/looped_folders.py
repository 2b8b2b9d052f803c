"""Folders of models that were published looped, tiny and random, in the layouts of their releases: Huginn, Retrofit,
Ouro."""

import json
import math

import safetensors.torch as safetensors
import torch
from test_pretrained import change, rewrite, saved

VOCAB, WIDTH, HEADS, DIM, HIDDEN, LENGTH = 60, 32, 4, 8, 48, 40
STD = math.sqrt(2 / 5280 / 5)
"""Of Huginn's own width, which Retrofit keeps."""
HUGINN = {
    "model_type": "huginn_raven", "architectures": ["RavenForCausalLM"], "n_embd": WIDTH, "n_heads": HEADS,
    "num_key_value_heads": HEADS, "head_dim": DIM, "n_layers": 5, "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 2, "n_layers_in_coda": 1, "intermediate_size": HIDDEN, "vocab_size": VOCAB,
    "padded_vocab_size": VOCAB, "block_size": 128, "tie_embeddings": True, "qk_bias": True, "bias": False,
    "norm_eps": 1e-6, "rope_base": 50000, "mean_recurrence": 32, "mean_backprop_depth": 8, "injection_type": "linear",
    "state_init": "like-init", "block_class_name": "SandwichBlock", "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP", "nonlin_name": "SiLU", "sampling_scheme": "poisson-lognormal-filling",
    "test_time_noise": 0, "init_values": {"std": math.sqrt(2 / 5 / WIDTH), "embed_scale": math.sqrt(WIDTH)}}
RETROFIT = HUGINN | {"qk_bias": False, "tie_embeddings": False, "rope_theta": 10000.0, "num_key_value_heads": 2,
                     "init_values": {"std": STD, "embed_scale": 1.0}}
VARIANTS = {"published": {}, "untied": {"tie_embeddings": False}, "add": {"injection_type": "add"},
            "without biases": {"qk_bias": False, "init_values": None},
            "grouped": {"qk_bias": False, "num_key_value_heads": 2}}
WIDE = {"rms_norm_eps": 1e-6, "initializer_range": 0.2}
"""Of a donor: weights that are large enough for attention to choose."""
PLACES = {"prelude": range(2), "core_block": range(2), "coda": range(1)}


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, scale=1.0: scale * torch.randn(*shape, generator=generator)


def write(folder, raw, tensors):
    (folder / "config.json").write_text(json.dumps(raw))
    safetensors.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def huginn(folder, variant="published"):
    """A folder in Huginn's layout: random weights, gains and biases, and the angles that its class saves."""
    raw, normal = HUGINN | VARIANTS[variant], draw()
    keys, small = raw["num_key_value_heads"] * DIM, WIDTH**-0.5
    found = {"transformer.wte.weight": normal(VOCAB, WIDTH, scale=small), "freqs_cis": torch.ones(1, 8, 1, 4, 2),
             "transformer.ln_f.weight": 1 + normal(WIDTH, scale=0.3)}
    if raw["injection_type"] == "linear":
        found["transformer.adapter.weight"] = normal(WIDTH, 2 * WIDTH, scale=small)
    if not raw["tie_embeddings"]:
        found["lm_head.weight"] = normal(VOCAB, WIDTH, scale=small)
    for name in (f"transformer.{part}.{i}" for part, numbers in PLACES.items() for i in numbers):
        found |= {f"{name}.norm_{i}.weight": 1 + normal(WIDTH, scale=0.3) for i in (1, 2, 3, 4)} | {
            f"{name}.attn.Wqkv.weight": normal(WIDTH + 2 * keys, WIDTH, scale=small),
            f"{name}.attn.proj.weight": normal(WIDTH, WIDTH, scale=small),
            f"{name}.mlp.fc.weight": normal(2 * HIDDEN, WIDTH, scale=small),
            f"{name}.mlp.proj.weight": normal(WIDTH, HIDDEN, scale=HIDDEN**-0.5)}
        if raw["qk_bias"]:
            found[f"{name}.attn.qk_bias"] = normal(2, 1, HEADS, DIM)
    write(folder, raw, found)
    return raw, {name: tensor.double() for name, tensor in found.items()}


def retrofit(folder, donor="Llama", adapter=None, **settings):
    """Layers 0 1 | 3 4 | 5 of a donor as the paper's conversion writes them by Huginn's class, which has two more
    norms. The adapter is [0 | I] if none is given. Returns the donor."""
    theirs = saved(folder, donor, WIDE)
    state, olmo = theirs.state_dict(), donor == "Olmo2"
    norms = ("post_attention_layernorm", "post_feedforward_layernorm") if olmo else (
        "input_layernorm", "post_attention_layernorm")
    eye = torch.cat([torch.zeros(WIDTH, WIDTH), torch.eye(WIDTH)], dim=1)
    found = {"transformer.wte.weight": state["model.embed_tokens.weight"], "lm_head.weight": state["lm_head.weight"],
             "transformer.ln_f.weight": state["model.norm.weight"], "freqs_cis": torch.ones(1, 8, 1, 4, 2),
             "transformer.adapter.weight": eye if adapter is None else adapter}
    places = [f"transformer.{part}.{i}" for part, numbers in PLACES.items() for i in numbers]
    for name, number in zip(places, [0, 1, 3, 4, 5], strict=True):
        own = {key.removeprefix(f"model.layers.{number}."): value for key, value in state.items()
               if key.startswith(f"model.layers.{number}.")}
        found |= {f"{name}.attn.Wqkv.weight": torch.cat([own[f"self_attn.{part}_proj.weight"] for part in "qkv"]),
                  f"{name}.attn.proj.weight": own["self_attn.o_proj.weight"],
                  f"{name}.mlp.fc.weight": torch.cat([own[f"mlp.{half}_proj.weight"] for half in ("gate", "up")]),
                  f"{name}.mlp.proj.weight": own["mlp.down_proj.weight"],
                  **{f"{name}.norm_{i}.weight": own[f"{norm}.weight"] for i, norm in enumerate(norms, 1)},
                  f"{name}.norm_3.weight": torch.ones(WIDTH), f"{name}.norm_4.weight": torch.ones(WIDTH)}
        if olmo:
            found |= {f"{name}.attn.{part}_norm.weight": own[f"self_attn.{part}_norm.weight"] for part in "qk"}
    scaling = theirs.config.rope_parameters
    rope = {"rope_theta": scaling["rope_theta"]} | ({"rope_scaling": scaling} if "factor" in scaling else {})
    write(folder, RETROFIT | rope | settings, found)
    return theirs


def ouro(folder, passes=4):
    """A Llama with two norms more in each layer and an exit gate."""
    saved(folder, "Llama", WIDE)
    normal = draw(5)
    rewrite(folder, lambda t: t.update(
        {f"model.layers.{i}.{name}_2.weight": 1 + normal(WIDTH, scale=0.3) for i in range(6)
         for name in ("input_layernorm", "post_attention_layernorm")}
        | {"model.early_exit_gate.weight": normal(1, WIDTH, scale=0.2), "model.early_exit_gate.bias": normal(1)}))
    change(folder, model_type="ouro", total_ut_steps=passes, early_exit_threshold=1.0, use_sliding_window=False)
    return {name: tensor.double() for name, tensor in safetensors.load_file(folder / "model.safetensors").items()}
