"""Folders that transformers saves, read as models of this package: the same logits as their own class, whole and cut;
and folders that are not what they say."""

import json
from pathlib import Path

import pytest
import torch

from looped.errors import UserError
from looped.hub.families import FAMILIES, read_pretrained

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

VOCAB, LAYERS = 60, 6
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "num_hidden_layers": LAYERS, "max_position_embeddings": 128, "pad_token_id": None,
         "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SAVED = {"Llama": {}, "Llama, tied": {"tie_word_embeddings": True}, "Llama, llama3": {"rope_parameters": LLAMA3},
         "Llama, yarn": {"rope_parameters": YARN | {"beta_fast": 4.0, "truncate": False, "attention_factor": 1.2}},
         "Mistral": {}, "Qwen2": {}, "Qwen3": {"head_dim": 16}, "Olmo2": {}, "SmolLM3": {}}


def saved(folder, name="Llama", settings=None, **how):
    """A tiny model of a family with random weights, gains and biases, as save_pretrained leaves it."""
    family = name.split(",")[0]
    config = getattr(transformers, f"{family}Config")(**SIZES | SAVED.get(name, {}) | (settings or {}))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, **how)
    return model


def tokens():
    return torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def cut_logits(model, layers):
    """Logits of some layers of a model, run by transformers itself."""
    model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in layers)
    model.config.num_hidden_layers = len(layers)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_is_the_model_that_was_saved(name, tmp_path):
    theirs = saved(tmp_path, name)
    ours, config = read_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(tokens(), 1), theirs.double()(tokens(), use_cache=False).logits,
                                   rtol=1e-6, atol=1e-6)
    assert (config.objective, config.main_depth, config.model.num_core_layers) == ("full", 1, LAYERS)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Olmo2"])
@pytest.mark.parametrize("depth", [1, 4, 8])
def test_a_cut_computes_what_its_layers_do_at_any_depth(name, depth, tmp_path):
    """First two, last one, and the two right before it; the injection leaves the state out until it is trained."""
    theirs = saved(tmp_path, name)
    ours, config = read_pretrained(tmp_path, layers="2/2/1")
    noise = torch.randn(2, 40, 32)
    with torch.no_grad():
        found = ours(tokens(), depth, noise=noise)
    torch.testing.assert_close(found, cut_logits(theirs, [0, 1, 3, 4, 5]), rtol=1e-4, atol=2e-5)
    assert (config.objective, config.model.injection) == ("truncated", "linear")


def test_nanbeige_loops_its_whole_stack_with_a_norm_after_each_pass(tmp_path):
    """Two passes of a Llama's layers, the norm fed on: written out with transformers' own layers."""
    theirs = saved(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "nanbeige", "num_loops": 2}))
    ours, config = read_pretrained(tmp_path)
    inner, x = theirs.model, theirs.model.embed_tokens(tokens())
    with torch.no_grad():
        place = torch.arange(40)[None]
        angles = inner.rotary_emb(x, place)
        mask = torch.full((40, 40), -torch.inf).triu(1)[None, None]
        for _ in range(2):
            for layer in inner.layers:
                x = layer(x, attention_mask=mask, position_ids=place, position_embeddings=angles)
                x = x[0] if isinstance(x, tuple) else x
            x = inner.norm(x)
        torch.testing.assert_close(ours(tokens(), 2), theirs.lm_head(x), rtol=1e-4, atol=2e-5)
    assert config.main_depth == 2


def test_a_sharded_folder_is_read_as_a_whole_one(tmp_path):
    theirs = saved(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ours, _ = read_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens(), 1), theirs(tokens(), use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_an_index_that_is_none_is_one_sentence(tmp_path):
    saved(tmp_path, max_shard_size="20KB")
    for text in ("{", "[]", "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match="is not an index of shards"):
            read_pretrained(tmp_path)


def change(folder, **settings):
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewrite(folder, edit):
    path = Path(folder) / "model.safetensors"
    tensors = safetensors.load_file(path)
    edit(tensors)
    safetensors.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


LAST = "model.layers.5.self_attn.q_proj.weight"
BROKEN = {
    "no folder": (lambda f: (f / "config.json").unlink(), "is not a model's folder: config.json cannot be read"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "is not a model's config"),
    "unknown family": (lambda f: change(f, model_type="lama"), "family 'lama', which is not known here; did you mean"),
    "a tensor is missing": (lambda f: rewrite(f, lambda t: t.pop(LAST)), f"has no tensor {LAST}"),
    "a tensor too many": (lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(2))), "holds extra, which has"),
    "a layer too many": (lambda f: change(f, num_hidden_layers=5), "holds model.layers.5.* and 8 more, which"),
    "another shape": (lambda f: rewrite(f, lambda t: t.update({LAST: torch.ones(2, 2)})),
                      rf"has {LAST} of shape \(2, 2\), but by its config.json it is \(32, 32\)"),
    "a config that lies": (lambda f: change(f, intermediate_size=40), "of shape .* but by its config.json it is"),
    "a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickles, which are not read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors; fetch the folder again"),
    "cut short": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1000]),
                  "is cut short or damaged"),
    "another activation": (lambda f: change(f, hidden_act="relu"), "has hidden_act 'relu', which no model"),
    "a part of each head turned": (lambda f: change(f, partial_rotary_factor=0.5), "has partial_rotary_factor 0.5"),
    "a bias": (lambda f: change(f, attention_bias=True), "has attention_bias True"),
    "no base of positions": (lambda f: change(f, rope_parameters=None), "does not set rope_theta"),
    "no epsilon": (lambda f: change(f, rms_norm_eps=None), "does not set rms_norm_eps"),
    "another loop": (lambda f: change(f, model_type="nanbeige", num_loops=2, skip_loop_final_norm=True),
                     "has skip_loop_final_norm True"),
    "a scaling": (lambda f: change(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}), "by 'dynamic'"),
    "half of yarn": (lambda f: change(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
                     "does not set factor"),
    "DeepSeek's yarn": (lambda f: change(f, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}),
                        "has mscale 0.7, which no model")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_what_it_says_is_one_sentence(name, tmp_path):
    saved(tmp_path)
    damage, why = BROKEN[name]
    damage(tmp_path)
    with pytest.raises(UserError, match=why) as error:
        read_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("layers", "why"), [("4/8", "is not three numbers"), ("1/x/1", "is not three numbers"),
                                             ("2/4/2", "asks for 8 layers"), ("2/0/2", "at least one of them")])
def test_a_cut_that_cannot_be_is_one_sentence(layers, why, tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match=why):
        read_pretrained(tmp_path, layers=layers)


def test_a_looped_model_is_not_cut(tmp_path):
    saved(tmp_path)
    change(tmp_path, model_type="nanbeige", num_loops=2)
    with pytest.raises(UserError, match="already loops all of its layers"):
        read_pretrained(tmp_path, layers="2/2/1")


def test_a_window_is_refused_rather_than_left_out(tmp_path):
    saved(tmp_path, "Mistral", {"sliding_window": 8})
    with pytest.raises(UserError, match="attends within a window of 8 tokens"):
        read_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_config_that_leaves_ties_to_its_class_is_read_by_its_tensors(tied, tmp_path):
    theirs = saved(tmp_path, "SmolLM3", {"tie_word_embeddings": tied})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "tie_word_embeddings"}))
    ours, config = read_pretrained(tmp_path)
    assert config.model.tie_embeddings == tied
    torch.testing.assert_close(ours(tokens(), 1), theirs(tokens(), use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_layers_that_see_a_window_alone_are_refused(tmp_path):
    saved(tmp_path, "Qwen3")
    change(tmp_path, layer_types=["sliding_attention"] * LAYERS)
    with pytest.raises(UserError, match="has layer_types"):
        read_pretrained(tmp_path)


def test_every_family_has_a_test():
    """Looped ones in test_looped_families.py, where Huginn and two Retrofits share a name."""
    looped = ["nanbeige", "ouro", *["huginn_raven"] * 3]
    dense = {name.split(",")[0].lower() for name in SAVED}
    assert sorted([*dense, *looped]) == sorted(family.name for family in FAMILIES)
