"""Models in Llama's layout: Llama, Mistral, Qwen2, Qwen3, OLMo2, SmolLM3; and two that loop, Nanbeige4.2 and Ouro."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from looped.config import Config
from looped.config.model_families import PRESETS
from looped.errors import UserError
from looped.hub.families.base import CORE, Cut, Family, Layout, Link, Places, Raw, refuse, require, same
from looped.hub.families.export_config import check_like, core_layers, rope_parameters

PRENORM = {"n1": "input_layernorm", "n3": "post_attention_layernorm"}
POSTNORM = {"n2": "post_attention_layernorm", "n4": "post_feedforward_layernorm"}
SANDWICH = PRENORM | {"n2": "input_layernorm_2", "n4": "post_attention_layernorm_2"}
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "olmo2": "Olmo2",
                 "nanbeige": "Nanbeige", "ouro": "Ouro", "smollm3": "SmolLM3"}
ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}


@dataclass(frozen=True)
class Stack(Family):
    """A family of dense stacks. norms: our names -> theirs; bias: the projections with a bias, of "qkv"; qk_norm: norms
    of queries and keys; windowed: its configs may have an attention window, which is refused."""

    name: str
    norms: Mapping[str, str] = field(default_factory=lambda: PRENORM)
    bias: str = ""
    qk_norm: bool = False
    windowed: bool = False

    def completed(self, raw: Raw, names: Collection[str]) -> Raw:
        """Adds a missing `tie_word_embeddings`, whose default differs between families: an untied head is a tensor."""
        return {"tie_word_embeddings": "lm_head.weight" not in names, **raw}

    def cut(self, raw: Raw, layers: str | None, folder: str) -> Cut:
        """All layers as one block, which runs once; or prelude, core and coda."""
        num = raw["num_hidden_layers"]
        return Cut.whole(num) if layers is None else Cut.of(layers, num)

    def settings(self, raw: Raw, folder: str) -> dict[str, Any]:
        """The settings of the preset, with the sizes and numbers of a config.json."""
        refuse(raw, folder, hidden_act="silu", mlp_bias=False)
        if self.windowed:
            _refuse_window(raw, folder)
        rope = rope_of(raw)
        for part in (raw, rope):
            refuse(part, folder, partial_rotary_factor=1.0)
        require(raw, folder, "hidden_size", "num_attention_heads", "intermediate_size", "rms_norm_eps")
        require(rope, folder, "rope_theta")
        if "attention_bias" not in PRESETS[self.name]:
            refuse(raw, folder, attention_bias=False)
        found = {
            "preset": self.name, "width": raw["hidden_size"], "num_heads": raw["num_attention_heads"],
            "num_kv_heads": raw.get("num_key_value_heads"), "head_dim": raw.get("head_dim"),
            "ffn_width": raw["intermediate_size"], "norm_eps": raw["rms_norm_eps"], "rope_base": rope["rope_theta"],
            "rope_scaling": scaling(rope, folder), "tie_embeddings": bool(raw["tie_word_embeddings"]),
            "injection": "none", "state_init": "embedding"}
        return {f"model.{name}": value for name, value in found.items()} | {
            "objective": "full", "recurrence.mean": self.passes(raw)}

    def passes(self, raw: Raw) -> int:
        """Number of passes through the stack."""
        return 1

    def links(self, raw: Raw, cut: Cut) -> list[Link]:
        return self.links_at(raw, cut.places(), "norm")

    def links_at(self, raw: Raw, places: Places, norm: str) -> list[Link]:
        """The links of all tensors of a model with layers at these places; norm: our name of the last norm."""
        found = [same("embed.weight", "model.embed_tokens.weight"), same(f"{norm}.weight", "model.norm.weight")]
        if not raw["tie_word_embeddings"]:
            found.append(same("head.weight", "lm_head.weight"))
        for ours, number in places:
            found += self._layer(ours, f"model.layers.{number}")
        return found

    def _layer(self, ours: str, theirs: str) -> list[Link]:
        found = [same(f"{ours}.{norm}.weight", f"{theirs}.{name}.weight") for norm, name in self.norms.items()]
        found += [same(f"{ours}.attn.{part}.weight", f"{theirs}.self_attn.{name}.weight")
                  for part, name in ATTENTION.items()]
        found += [same(f"{ours}.attn.{part}.bias", f"{theirs}.self_attn.{ATTENTION[part]}.bias") for part in self.bias]
        if self.qk_norm:
            found += [same(f"{ours}.attn.{part}_norm.weight", f"{theirs}.self_attn.{part}_norm.weight")
                      for part in "qk"]
        gate, up = (f"{theirs}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        return [*found, same(f"{ours}.mlp.in_.weight", gate, up),
                same(f"{ours}.mlp.out.weight", f"{theirs}.mlp.down_proj.weight")]

    def written(self, config: Config, vocab_size: int, depth: int) -> Layout:
        """The loop unrolled: P + N * depth + C layers, with the core's repeated for each step."""
        check_like(config, self.name, injection="none", state_init="embedding")
        model = config.model
        ours = [*(f"prelude.{number}" for number in range(model.num_prelude_layers)), *core_layers(config, depth),
                *(f"coda.{number}" for number in range(model.num_coda_layers))]
        raw = self._raw(config, vocab_size, len(ours))
        return Layout(raw, self.links_at(raw, [(name, number) for number, name in enumerate(ours)], "norm"))

    def _raw(self, config: Config, vocab_size: int, num_layers: int) -> dict[str, Any]:
        """The config.json of a model with `num_layers` layers."""
        m = config.model
        return {"model_type": self.name, "architectures": [f"{ARCHITECTURES[self.name]}ForCausalLM"],
                "vocab_size": vocab_size, "hidden_size": m.width, "num_hidden_layers": num_layers,
                "num_attention_heads": m.num_heads, "num_key_value_heads": m.kv_heads, "head_dim": m.head_width,
                "intermediate_size": m.hidden, "hidden_act": "silu", "rms_norm_eps": m.norm_eps,
                "rope_parameters": rope_parameters(m), "rope_theta": m.rope_base,
                "tie_word_embeddings": m.tie_embeddings, "attention_dropout": 0.0,
                "sliding_window": None, "use_sliding_window": False}

    def left_out(self, raw: Raw, cut: Cut) -> str:
        numbers = "|".join(str(number) for number in sorted(cut.left_out(raw["num_hidden_layers"])))
        return rf"\.layers\.({numbers})\." if numbers else super().left_out(raw, cut)


def _refuse_window(raw: Raw, folder: str) -> None:
    refuse(raw, folder, layer_types=["full_attention"] * raw["num_hidden_layers"])
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    if window is not None:
        raise UserError(f"{folder} attends within a window of {window} tokens, but models here attend to all earlier "
                        f"ones; set sliding_window to null in its config.json to use it for texts no longer than that")


def rope_of(raw: Raw) -> Mapping[str, Any]:
    """The settings of rotary positions in a config.json of transformers 5 or 4."""
    return raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta")}


def scaling(rope: Mapping[str, Any], folder: str) -> dict[str, Any] | None:
    """The scaling of rotary positions as our setting. Raises UserError."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        require(rope, folder, "factor")
        return {"kind": "linear", "factor": rope["factor"]}
    if kind == "llama3":
        require(rope, folder, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return {"kind": "llama3", "factor": rope["factor"], "low_freq_factor": rope["low_freq_factor"],
                "high_freq_factor": rope["high_freq_factor"],
                "original_length": rope["original_max_position_embeddings"]}
    if kind == "yarn":
        require(rope, folder, "factor", "original_max_position_embeddings")
        refuse(rope, folder, mscale=None, mscale_all_dim=None)
        return {"kind": "yarn", "factor": rope["factor"], "original_length": rope["original_max_position_embeddings"],
                "beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1,
                "truncate": rope.get("truncate", True), "attention_factor": rope.get("attention_factor")}
    raise UserError(f"{folder} scales its rotary positions by '{kind}', which is not supported; linear, llama3 and "
                    f"yarn are")


class SmolLM3(Stack):
    """SmolLM3, in which every fourth layer has no rotary positions."""

    def settings(self, raw: Raw, folder: str) -> dict[str, Any]:
        interval, layers = raw.get("no_rope_layer_interval", 4), raw.get("no_rope_layers")
        expected = [int((number + 1) % interval != 0) for number in range(raw["num_hidden_layers"])]
        if layers is not None and list(layers) != expected:
            raise UserError(f"{folder} leaves rotary positions out of custom layers (no_rope_layers); only every "
                            f"{interval}th layer is supported")
        return super().settings(raw, folder) | {"model.nope_interval": interval}

    def written(self, config: Config, vocab_size: int, depth: int) -> Layout:
        if depth > 1:
            raise UserError(f"smollm3 leaves rotary positions out of every {config.model.nope_interval}th layer, so "
                            f"its loop cannot be unrolled to {depth} steps; export it --to hf")
        found = super().written(config, vocab_size, depth)
        return replace(found, raw=found.raw | {"no_rope_layer_interval": config.model.nope_interval})


@dataclass(frozen=True)
class Passes(Stack):
    """A family that runs its whole stack several times, with its last norm after each pass. count: their name for the
    number of passes."""

    count: str = "num_loops"

    def cut(self, raw: Raw, layers: str | None, folder: str) -> Cut:
        if layers is not None:
            raise UserError(f"{folder} already loops all of its layers, so --layers {layers} has no dense stack to "
                            f"cut; leave it out")
        return super().cut(raw, None, folder)

    def settings(self, raw: Raw, folder: str) -> dict[str, Any]:
        require(raw, folder, self.count)
        refuse(raw, folder, skip_loop_final_norm=False)
        return super().settings(raw, folder)

    def passes(self, raw: Raw) -> int:
        return raw[self.count]

    def links(self, raw: Raw, cut: Cut) -> list[Link]:
        return self.links_at(raw, cut.places(), f"{CORE}.norm")

    def written(self, config: Config, vocab_size: int, depth: int) -> Layout:
        """The stack once, with the number of passes; all layers must be in the loop."""
        check_like(config, self.name, num_prelude_layers=0, num_coda_layers=0)
        if config.blocks.num > 1:
            raise UserError(f"blocks.num is {config.blocks.num}, but {self.name} has one block of layers; train it "
                            f"with one, or export it --to hf")
        num = config.model.num_core_layers
        raw = self._raw(config, vocab_size, num) | {self.count: depth, "skip_loop_final_norm": False}
        return Layout(raw, self.links(raw, Cut.whole(num)))


class Ouro(Passes):
    """Ouro (arXiv 2510.25741) and STARS (arXiv 2605.26733), finetuned from it: norms before and after each branch.

    The threshold of their exit gate is not part of a model here: every token takes all passes, as with the published
    threshold 1, unless an exit rule uses the gate. Another threshold gives a warning."""

    def settings(self, raw: Raw, folder: str) -> dict[str, Any]:
        refuse(raw, folder, early_exit_step=None)
        threshold = raw.get("early_exit_threshold")
        if threshold not in (None, 1):
            warnings.warn(f"{folder} has early_exit_threshold {threshold}, so tokens leave its loop early; here all "
                          f"passes run, except for problems that are solved with --exits gate={threshold}",
                          stacklevel=2)
        return super().settings(raw, folder)

    def links_at(self, raw: Raw, places: Places, norm: str) -> list[Link]:
        return [*super().links_at(raw, places, norm),
                *(same(f"exit_gate.{part}", f"model.early_exit_gate.{part}") for part in ("weight", "bias"))]


DENSE = (Stack("llama"), Stack("mistral", windowed=True), Stack("qwen2", bias="qkv", windowed=True),
         Stack("qwen3", qk_norm=True, windowed=True), Stack("olmo2", norms=POSTNORM, qk_norm=True),
         SmolLM3("smollm3", windowed=True))
PASSES = (Passes("nanbeige"), Ouro("ouro", norms=SANDWICH, windowed=True, count="total_ut_steps"))
