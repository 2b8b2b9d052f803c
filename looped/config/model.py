"""Settings of the network: sizes, layers, and how the encoded input enters the loop."""

from typing import Literal

from pydantic import Field, model_validator

from looped.config.base import Count, Depth, Positive, Section


class ModelConfig(Section):
    """The network: prelude, weight-tied core, coda."""

    width: int = Field(128, ge=2, description="width D of the residual stream")
    num_heads: int = Field(4, ge=1, description="query heads H")
    num_kv_heads: int | None = Field(None, ge=1, description="key and value heads; null means num_heads")
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
    block: Literal["prenorm", "sandwich"] = Field("prenorm", description="sandwich: Huginn's second norm, on the sum")
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys before the rotation")
    rope_base: Positive = Field(10_000.0, description="base of the rotary frequencies")
    norm_eps: Positive = Field(1e-6, description="epsilon of every RMSNorm")
    injection: Literal["none", "add", "linear", "gated", "diagonal"] = Field(
        "linear", description="how the encoded input enters each loop step")
    state_init: Literal["like-init", "zero", "embedding", "noise"] = Field(
        "like-init", description="state before the first loop step (loop objectives)")
    tie_embeddings: bool = Field(True, description="the head is the transposed embedding")
    patch_size: Depth = Field(4, description="side of the square patches that images are cut into, in pixels")
    attention: Literal["auto", "xformers", "sdpa", "flex"] = Field("auto", description="attention backend")

    @model_validator(mode="after")
    def _check_heads(self):
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            step = 2 * self.num_heads
            low = max(step, self.width // step * step)
            raise ValueError(f"width {self.width} does not split into num_heads {self.num_heads} heads of even size; "
                             f"try {low} or {low + step}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                             f"try {self.num_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def hidden(self) -> int:
        return self.ffn_width or 4 * self.width

    @property
    def ffn_inputs(self) -> int:
        """Numbers that the feed-forward net's activation is taken of."""
        return self.hidden * (2 if self.ffn == "swiglu" else 1)
