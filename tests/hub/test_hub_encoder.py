"""An encoder from transformers gives its last hidden state at the last token, whatever else is in the batch."""

import pytest
import torch
from tiny_models import TEXT

from looped.errors import UserError
from looped.evaluation.mauve import Encoder
from looped.hub.encoder import HubEncoder

TEXTS = ["def f(x):", "    return x * 12  # naïve: 144 → 🙂", "x", TEXT[:300]]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def encoder(request, folders):
    return HubEncoder(folders[request.param])


@torch.no_grad()
def test_features_are_the_last_hidden_state_of_each_text_alone(encoder):
    assert isinstance(encoder, Encoder)
    features = encoder.features(TEXTS)
    for text, feature in zip(TEXTS, features, strict=True):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"][:64]])  # what these models can read
        hidden = encoder.model(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(feature, hidden[0, -1], rtol=1e-4, atol=1e-4)
    assert len({tuple(feature.tolist()) for feature in features}) == len(TEXTS)


def test_the_head_plays_no_part(encoder):
    assert not hasattr(encoder.model, "lm_head")


def test_a_text_without_tokens_has_features_too(encoder):
    assert encoder.features(["", "x"]).isfinite().all()


def test_an_encoder_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match="does not exist"):
        HubEncoder("./nowhere")
