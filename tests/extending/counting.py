"""A kind of text without a tokenizer, in one file: numbers that count up, as token ids."""

import numpy as np

from looped.config.kinds import Kind
from looped.data.from_config import Found
from looped.data.loader import TokenStream
from looped.domains import Text


class Numbers:
    """Opened data: 0, 1, ... modulo - 1, 0, ..."""

    tokenizer = picture = end_of_text = None
    bytes_per_token = 1.0

    def __init__(self, modulus):
        ids = np.arange(4000) % modulus
        self.train = TokenStream("train", ids[:3000], end_of_text=-1)
        self.heldout = TokenStream("held-out", ids[3000:], end_of_text=-1)
        self.vocab_size, self.fingerprint = modulus, f"counting-{modulus}"
        self.facts = {"source": "counting", "modulus": modulus}
        self.summary = f"counting modulo {modulus}"


class Counting(Text):
    """Next numbers."""

    kind = Kind("counting", "counting", lambda config: "domain.name counting.Counting",
                reads=("data.length", "evaluation.num_sequences", "evaluation.num_samples"),
                sees_all=lambda config: False, writes=True, like="text", metric="nats_per_token")

    def find(self, config):
        data = Numbers(config.domain.options.get("modulus", 10))
        return Found(data.fingerprint, data.facts, lambda seen: data)
