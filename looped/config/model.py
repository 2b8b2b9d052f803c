"""Settings of the network: sizes, layers, and the injection of the encoded input into the loop."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from looped.config.base import Count, Depth, Positive, Section
from looped.config.model_families import PRESETS, preset

NO_NORM_BEFORE = ("postnorm", "original")
"""Values of `model.block` without a norm on the input of each branch, which a modulation would act on."""


class RopeScaling(Section):
    """Rotary frequencies for contexts longer than those of pretraining, as in transformers' `rope_scaling`."""

    kind: Literal["linear", "llama3", "yarn"] = Field(
        default="llama3",
        description="linear: divide all frequencies by `factor`; llama3 and yarn: only the low ones, with a ramp "
                    "between, over frequency (llama3) or frequency index (yarn)")
    factor: Positive = Field(default=8.0, description="divisor of the frequencies")
    low_freq_factor: Positive = Field(
        default=1.0, description="llama3: full division for wavelengths above original_length / this")
    high_freq_factor: Positive = Field(
        default=4.0, description="llama3: no division for wavelengths below original_length / this")
    original_length: int = Field(
        default=8192, ge=1, description="llama3 and yarn: context length of pretraining, in tokens")
    beta_fast: Positive = Field(
        default=32.0,
        description="yarn: no division for frequencies with more rotations than this in original_length tokens")
    beta_slow: Positive = Field(
        default=1.0, description="yarn: full division for frequencies with fewer rotations than this")
    truncate: bool = Field(default=True, description="yarn: the ramp begins and ends at whole frequency indices")
    attention_factor: Positive | None = Field(
        default=None,
        description="yarn: factor on both rotated queries and rotated keys; null means 0.1 ln(factor) + 1, or 1 if "
                    "`factor` is below 1")

    @model_validator(mode="after")
    def _check_ramp(self):
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast:g} is below beta_slow {self.beta_slow:g}; swap them")
        return self


class ModelConfig(Section):
    """The network: prelude, weight-tied core, coda."""

    preset: str | None = Field(
        default=None,
        description=f"a model family whose settings replace the defaults of this section: {', '.join(PRESETS)}")
    width: int = Field(default=128, ge=2, description="width D of the residual stream")
    num_heads: int = Field(default=4, ge=1, description="query heads H")
    num_kv_heads: int | None = Field(default=None, ge=1, description="key and value heads; null means num_heads")
    head_dim: int | None = Field(default=None, ge=2, description="width per head; null means width / num_heads")
    attention_bias: Literal["none", "qk", "qkv"] = Field(
        default="none",
        description="attention projections with a bias: none, queries and keys (Huginn), or values too (Qwen2)")
    ffn: Literal["swiglu", "gelu"] = Field(
        default="swiglu",
        description="feed-forward network: gelu with two matrices, as in BERT and ViT, or swiglu with three")
    ffn_width: int | None = Field(
        default=None, ge=1, description="hidden width of the feed-forward network; null means 4 * width")
    num_prelude_layers: Count = Field(default=1, description="layers before the loop")
    num_core_layers: Depth = Field(default=2, description="layers inside the loop, over all its blocks")
    core: str | None = Field(
        default=None,
        description="a custom core in place of each block of layers: the dotted path of a module that is constructed "
                    "as (width, num_layers, cond_width) and called as (state, e, cond) or, with the attention pattern, "
                    "(state, e, cond, rows)")
    latent_updates: Count = Field(
        default=0,
        description="updates of a second, latent state in each loop step, z <- core(z, y + e), before that of the "
                    "state that is decoded, y <- core(y, z), all by the same layers; 0: a single state (TRM: 6)")
    core_runs: Depth = Field(
        default=1,
        description="runs of the core in each loop step (also in the only one of ar), or in each network evaluation of "
                    "a denoiser, by the same weights; with several, each evaluation is a loop itself")
    num_coda_layers: Count = Field(default=1, description="layers after the loop")
    block: Literal["prenorm", "sandwich", "branch", "postnorm", "original"] = Field(
        default="prenorm",
        description="norms of each branch: on its input (prenorm), also on its sum with the residual (sandwich, "
                    "Huginn), also on its output (branch, Ouro), only on its output (postnorm, OLMo2), or only on its "
                    "sum with the residual (original, HRM and TRM)")
    qk_norm: bool | Literal["whole"] = Field(
        default=False,
        description="RMSNorm on queries and keys before the rotation: true, per head; whole, over all heads together "
                    "(OLMo2)")
    embed_scale: Positive | None = Field(
        default=None,
        description="scale of the token embeddings; null means sqrt(width) (Huginn); most other models have 1")
    loop_norm: Literal["before-coda", "none", "each-pass"] = Field(
        default="before-coda",
        description="further use of the final norm, which follows the coda: once after the loop (Huginn), none (Llama, "
                    "Retrofit), or after each pass, and then not repeated if there is no coda (Ouro, Nanbeige)")
    step_embedding: Literal["none", "add", "modulate"] = Field(
        default="none",
        description="embedding of the index of each loop step, which tells the core how deep it is: none, a vector "
                    "added to the core's input, or a modulation of the core's layers (AdaLN); the first step is always "
                    "the plain one, and steps beyond the trained ones are defined")
    loop_scale: Literal["none", "branches", "update"] = Field(
        default="none",
        description="division by the trained number of loop steps: none, of every residual branch of the core, whose "
                    "initialisation then counts the core once, or of a step's whole change of the state")
    streams: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1,
        description="parallel residual streams of the loop's state, read, written and mixed by learned weights around "
                    "each loop step (hyper-connections); 1 is the plain state")
    stream_mixing: Literal["static", "dynamic"] = Field(
        default="static",
        description="weights of the streams: learned numbers, or numbers that also depend on the streams' content")
    rope_base: Positive = Field(default=10_000.0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(
        default=None, description="scaling of the rotary frequencies, for longer contexts than in pretraining")
    nope_interval: int | None = Field(
        default=None, ge=1,
        description="every n-th layer, counted from prelude to coda, has no rotary positions (SmolLM3: 4)")
    norm_eps: Positive = Field(default=1e-6, description="epsilon of every RMSNorm")
    injection: Literal["none", "add", "linear", "gated", "diagonal"] = Field(
        default="linear", description="injection of the encoded input into each run of the core")
    state_init: Literal["like-init", "zero", "embedding", "noise", "vector"] = Field(
        default="like-init",
        description="state before the first loop step (loop objectives); vector: one vector in all rows, drawn once "
                    "and kept with the weights (HRM, TRM)")
    state_std: Positive | None = Field(
        default=None,
        description="standard deviation of a random initial state; null means sqrt(2 / 5) for like-init, 1 for noise "
                    "and vector")
    exit_gate: bool = Field(
        default=False,
        description="a linear map from the state after each pass to the probability of leaving the loop there (Ouro), "
                    "used by the exit `gate`; trained by recurrence.loss_on gate")
    tie_embeddings: bool = Field(default=True, description="the head is the transposed embedding")
    padded_vocab_size: int | None = Field(
        default=None, ge=1,
        description="rows of embedding and head if there are more than tokens, as in many pretrained models; null "
                    "means one per token")
    patch_size: Depth = Field(default=4, description="side of the square patches that images are cut into, in pixels")
    attention: Literal["auto", "xformers", "flash", "cudnn", "flex", "sdpa"] = Field(
        default="auto",
        description="attention backend: auto (on CUDA xformers, and flex for masks that it does not have; elsewhere "
                    "sdpa), one of both by name, torch's SDPA, or SDPA with FlashAttention (flash) or cuDNN (cudnn) as "
                    "its first choice; it may be changed when a run is evaluated")

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        """Replace a preset by its settings."""
        if not isinstance(values, dict) or values.get("preset") is None:
            return values
        return preset(values["preset"]) | {name: value for name, value in values.items() if name != "preset"}

    @model_validator(mode="after")
    def _check_heads(self):
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and rotary positions rotate pairs of coordinates; set "
                             f"it to {self.head_dim + 1}")
        if self.head_dim is None and (self.width % self.num_heads or (self.width // self.num_heads) % 2):
            step = 2 * self.num_heads
            low = max(step, self.width // step * step)
            raise ValueError(f"width {self.width} does not split into num_heads {self.num_heads} heads of even size; "
                             f"try {low} or {low + step}")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and self.rope_base <= 1:
            raise ValueError(f"rope_scaling yarn needs decreasing frequencies, and rope_base {self.rope_base:g} gives "
                             f"none below the first; set it above 1, for instance to 10000")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                             f"try {self.num_heads}")
        return self

    @model_validator(mode="after")
    def _check_loop(self):
        if self.step_embedding == "modulate" and self.block in NO_NORM_BEFORE:
            raise ValueError(f"step_embedding modulate needs norms before the branches, which block {self.block} "
                             f"lacks; set step_embedding to add, or block to branch")
        if self.loop_scale == "branches" and self.core is not None:
            raise ValueError(f"loop_scale branches scales the branches of the package's layers, and core {self.core} "
                             f"has none; set loop_scale to update")
        return self

    @property
    def layer_runs(self) -> int:
        """Runs of each layer of the core in a loop step or network evaluation."""
        return (self.latent_updates + 1) * self.core_runs

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
        """Width of the input to the feed-forward network's activation."""
        return self.hidden * (2 if self.ffn == "swiglu" else 1)
