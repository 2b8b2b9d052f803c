"""Retrofit (McLeish et al. 2025, arXiv 2511.07384): layers of a Llama or an OLMo2 in Huginn's layout.

Names and order are those of convert_pretrained_model in github.com/LoopedLMs/retrofitting-recurrence. A layer is the
donor's, with two of Huginn's four norms; rotary positions rotate halves, and there is no norm between loop and coda.
Folders written by Huginn's own class also hold the other two norms and its angles, which are unused.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from looped.errors import UserError
from looped.hub.families.base import Link, Raw, refuse, require, same
from looped.hub.families.dense import rope_of, scaling
from looped.hub.families.huginn import Raven, is_retrofit

STATES = {"random": "like-init", "embed-init": "embedding"}
"""`initial_state_mode` -> our state_init."""


@dataclass(frozen=True)
class Retrofit(Raven):
    """A model made from one kind of donor. norms: our names -> theirs; block: their placement; whole: queries and keys
    have a norm over all heads."""

    norms: dict[str, str] = field(default_factory=lambda: {"n1": "norm_1", "n3": "norm_2"})
    block: str = "prenorm"
    whole: bool = False
    unused = r"^freqs_cis$|\.norm_[34]\.weight$|rotary_emb\.inv_freq$"

    def is_family_of(self, raw: Raw) -> bool:
        return super().is_family_of(raw) and is_retrofit(raw)

    def holds(self, names: Collection[str]) -> bool:
        return any(".attn.q_norm." in name for name in names) == self.whole

    def settings(self, raw: Raw, folder: str) -> dict[str, Any]:
        """Settings whose rotary base is `rope_theta`; `rope_base` is left from Huginn and unused."""
        refuse(raw, folder, qk_bias=False, injection_type="linear")
        rope, start = rope_of(raw), raw.get("initial_state_mode", "random")
        require(raw["init_values"], folder, "std")
        if start not in STATES:
            raise UserError(f"{folder} has initial_state_mode {start!r}, which no model here supports; only "
                            f"{' and '.join(STATES)} can be imported")
        return super().settings(raw, folder) | {
            "model.preset": "retrofit", "model.block": self.block, "model.qk_norm": "whole" if self.whole else False,
            "model.rope_base": rope["rope_theta"], "model.rope_scaling": scaling(rope, folder),
            "model.state_init": STATES[start],
            "model.state_std": raw["init_values"]["std"] if start == "random" else None}

    def layer(self, raw: Raw, ours: str, theirs: str) -> list[Link]:
        found = super().layer(raw, ours, theirs)
        if self.whole:
            found += [same(f"{ours}.attn.{part}_norm.weight", f"{theirs}.attn.{part}_norm.weight") for part in "qk"]
        return found


RETROFIT = (Retrofit(), Retrofit(norms={"n2": "norm_1", "n4": "norm_2"}, block="postnorm", whole=True))
"""From a Llama, and from an OLMo2; config.json does not distinguish them, norms of queries and keys do."""
