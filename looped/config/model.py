"""Settings of the network: sizes, layers, and how the encoded input enters the loop."""

from typing import Any, Literal

from pydantic import Field, model_validator

from looped.config.base import Count, Depth, Positive, Section
from looped.config.presets import PRESETS, preset


class RopeScaling(Section):
    """Rotary frequencies for texts longer than those of pretraining, as transformers' `rope_scaling` has them."""

    kind: Literal["linear", "llama3", "yarn"] = Field(
        "llama3", description="linear: all frequencies by `factor`; llama3 and yarn: the low ones alone, with a ramp "
                              "between, over frequencies (llama3) or over their numbers (yarn)")
    factor: Positive = Field(8.0, description="what frequencies are divided by")
    low_freq_factor: Positive = Field(1.0, description="of llama3: where the whole factor begins")
    high_freq_factor: Positive = Field(4.0, description="of llama3: where none is left")
    original_length: int = Field(8192, ge=1, description="of llama3 and yarn: tokens of the texts of pretraining")
    beta_fast: Positive = Field(32.0, description="of yarn: frequencies that turn so often in these stay")
    beta_slow: Positive = Field(1.0, description="of yarn: those that turn so rarely are divided by the whole factor")
    truncate: bool = Field(True, description="of yarn: the ramp begins and ends at whole numbers of frequencies")
    attention_factor: Positive | None = Field(
        None, description="of yarn: factor of rotated queries and keys each; null means 0.1 ln(factor) + 1, or 1 where "
                          "`factor` is below 1")

    @model_validator(mode="after")
    def _check_ramp(self):
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast:g} is below beta_slow {self.beta_slow:g}; exchange them")
        return self


class ModelConfig(Section):
    """The network: prelude, weight-tied core, coda."""

    preset: str | None = Field(
        None, description=f"a family whose settings of the model these are, but for what is set besides: "
                          f"{', '.join(PRESETS)}")
    width: int = Field(128, ge=2, description="width D of the residual stream")
    num_heads: int = Field(4, ge=1, description="query heads H")
    num_kv_heads: int | None = Field(None, ge=1, description="key and value heads; null means num_heads")
    head_dim: int | None = Field(None, ge=2, description="width of a head; null means width / num_heads")
    attention_bias: Literal["none", "qk", "qkv"] = Field(
        "none", description="projections of attention that have a bias: none, queries and keys (Huginn), or values too "
                            "(Qwen2)")
    ffn: Literal["swiglu", "gelu"] = Field(
        "swiglu", description="feed-forward net: gelu has two matrices, as BERT and ViT; swiglu three")
    ffn_width: int | None = Field(None, ge=1, description="its hidden width; null means 4 * width")
    num_prelude_layers: Count = Field(1, description="layers before the loop")
    num_core_layers: Depth = Field(2, description="layers inside the loop, over all its blocks")
    core: str | None = Field(
        None, description="a core of one's own in place of each block of layers: the dotted path of a module that is "
                          "made as (width, num_layers, cond_width) and called as (state, e, cond) or, told who sees "
                          "whom, (state, e, cond, rows)")
    num_coda_layers: Count = Field(1, description="layers after the loop")
    block: Literal["prenorm", "sandwich", "branch", "postnorm"] = Field(
        "prenorm", description="a second norm of each branch: on its sum with the residual (sandwich, Huginn), on its "
                               "output (branch, Ouro), or there alone (postnorm, OLMo2)")
    qk_norm: bool | Literal["whole"] = Field(
        False, description="RMSNorm on queries and keys before the rotation: true, of each head; whole, of all heads "
                           "together (OLMo2)")
    embed_scale: Positive | None = Field(
        None, description="factor of the embedded tokens; null means sqrt(width) (Huginn), most others have 1")
    loop_norm: Literal["before-coda", "none", "each-pass"] = Field(
        "before-coda", description="the final norm besides after the coda: once after the loop (Huginn), not at all "
                                   "(Llama, Retrofit), or after each pass, and where there is no coda not again (Ouro, "
                                   "Nanbeige)")
    rope_base: Positive = Field(10_000.0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(None, description="of frequencies, for longer texts than in pretraining")
    nope_interval: int | None = Field(
        None, ge=1, description="every n-th layer, counted from prelude to coda, has no rotary positions (SmolLM3: 4)")
    norm_eps: Positive = Field(1e-6, description="epsilon of every RMSNorm")
    injection: Literal["none", "add", "linear", "gated", "diagonal"] = Field(
        "linear", description="how the encoded input enters each loop step")
    state_init: Literal["like-init", "zero", "embedding", "noise"] = Field(
        "like-init", description="state before the first loop step (loop objectives)")
    state_std: Positive | None = Field(
        None, description="standard deviation of a random initial state; null means sqrt(2 / 5) of like-init, and 1")
    exit_gate: bool = Field(
        False, description="a linear map of the state after each pass to the chance of leaving the loop there (Ouro), "
                           "which the exit `gate` asks; trained by recurrence.loss_on gate")
    tie_embeddings: bool = Field(True, description="the head is the transposed embedding")
    padded_vocab_size: int | None = Field(
        None, ge=1, description="rows of embedding and head, where they are more than the tokenizer has tokens, as in "
                                "many pretrained models; null means as many")
    patch_size: Depth = Field(4, description="side of the square patches that images are cut into, in pixels")
    attention: Literal["auto", "xformers", "sdpa", "flex"] = Field("auto", description="attention backend")

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        """Afterwards there is no preset, only settings."""
        if not isinstance(values, dict) or values.get("preset") is None:
            return values
        return preset(values["preset"]) | {name: value for name, value in values.items() if name != "preset"}

    @model_validator(mode="after")
    def _check_heads(self):
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and rotary positions turn pairs of numbers; set it to "
                             f"{self.head_dim + 1}")
        if self.head_dim is None and (self.width % self.num_heads or (self.width // self.num_heads) % 2):
            step = 2 * self.num_heads
            low = max(step, self.width // step * step)
            raise ValueError(f"width {self.width} does not split into num_heads {self.num_heads} heads of even size; "
                             f"try {low} or {low + step}")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and self.rope_base <= 1:
            raise ValueError(f"rope_scaling yarn counts from high frequencies to low ones, and rope_base "
                             f"{self.rope_base:g} has none lower than the first; set it above 1, for instance to 10000")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                             f"try {self.num_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.width // self.num_heads

    @property
    def hidden(self) -> int:
        return self.ffn_width or 4 * self.width

    @property
    def ffn_inputs(self) -> int:
        """Numbers that the feed-forward net's activation is taken of."""
        return self.hidden * (2 if self.ffn == "swiglu" else 1)
