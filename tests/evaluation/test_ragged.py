"""Documents of several lengths: each has the losses that it has alone, and padding counts nowhere."""

import pytest
import torch

from looped import UserError, build, build_objective, evaluate_depth, load_config
from looped.evaluation.likelihood import losses_by_depth, token_losses_by_depth

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

V, DEPTHS = 12, [1, 3]
SMALL = {"model.width": 16, "model.num_heads": 2, "model.state_init": "zero", "recurrence.mean": 2,
         "denoise.target.dim": 4, "denoise.cond_width": 8, "denoise.noise.sigma_max": 8.0}
DOCUMENTS = [torch.arange(start, start + length) % V for start, length in ((0, 9), (3, 2), (5, 6), (1, 4))]


def objective_of(rule, **settings):
    config = load_config(None, SMALL | {"objective": rule} | settings)
    return build_objective(config, build(config, V))


@pytest.mark.parametrize("rule", ["full", "ar"])
def test_a_document_among_others_has_the_token_losses_that_it_has_alone(rule):
    objective = objective_of(rule)
    together = token_losses_by_depth(objective, DOCUMENTS, DEPTHS, batch_size=3)
    for row, document in enumerate(DOCUMENTS):
        alone = token_losses_by_depth(objective, [document], DEPTHS)[:, 0]
        torch.testing.assert_close(together[:, row, : len(document) - 1], alone)
        assert together[:, row, len(document) - 1 :].isnan().all()


@pytest.mark.parametrize("rule", ["full", "denoise"])
def test_the_mean_is_over_tokens_and_padding_is_not_among_them(rule):
    objective = objective_of(rule)
    losses = token_losses_by_depth(objective, DOCUMENTS, DEPTHS)
    sweep = evaluate_depth(objective, DOCUMENTS, DEPTHS, bytes_per_token=2.0)
    for number, depth in enumerate(DEPTHS):
        mean = losses[number][~losses[number].isnan()].double().mean().item()
        assert sweep.means("nats_per_token")[depth] == pytest.approx(mean, rel=1e-5)
        assert sweep.means("bits_per_byte")[depth] == pytest.approx(mean / 2 / 0.6931471805599453, rel=1e-5)


@pytest.mark.parametrize("filled", [0, 7])
def test_padded_rows_with_lengths_are_the_same_whatever_they_are_padded_with(filled):
    objective = objective_of("denoise")
    rows = torch.nn.utils.rnn.pad_sequence(DOCUMENTS, batch_first=True, padding_value=filled)
    lengths = torch.tensor([len(document) for document in DOCUMENTS])
    given, listed = (losses_by_depth(objective, tokens, DEPTHS, lengths=which)
                     for tokens, which in ((rows, lengths), (DOCUMENTS, None)))
    for one, other in zip(given, listed, strict=True):
        torch.testing.assert_close(one.losses, other.losses)
    unmasked = losses_by_depth(objective, rows, DEPTHS)
    assert abs(unmasked[0].losses.mean() - given[0].losses.mean()) > 1e-3


def test_rows_that_are_all_full_are_those_without_lengths():
    objective, rows = objective_of("full"), torch.arange(18).view(2, 9) % V
    one, other = (losses_by_depth(objective, rows, [2], lengths=which)[0] for which in (torch.tensor([9, 9]), None))
    assert torch.equal(one.losses, other.losses)


@pytest.mark.parametrize(("rule", "settings", "tokens", "lengths", "said"), [
    ("full", {}, DOCUMENTS, torch.tensor([1, 2, 3, 4]), "documents in a list have their own"),
    ("full", {}, [], None, "a list of tensors of one axis"),
    ("full", {}, [[1, 2, 3]], None, "a list of tensors of one axis"),
    ("full", {}, torch.zeros(2, 5).long(), torch.tensor([5, 6]), r"2 numbers of tokens, .*; got \[5, 6\]"),
    ("full", {}, torch.zeros(2, 5).long(), torch.tensor([1, 5]), "a document of one token has none to predict"),
    ("full", {}, torch.zeros(2, 5).long(), torch.tensor([5]), "2 numbers of tokens"),
    ("masked", {}, DOCUMENTS, None, "a token sees later ones"),
    ("denoise", {"denoise.block_size": 2}, DOCUMENTS, None, "a token sees later ones")])
def test_lengths_that_cannot_be_are_refused(rule, settings, tokens, lengths, said):
    with pytest.raises(UserError, match=said):
        losses_by_depth(objective_of(rule, **settings), tokens, [1], lengths=lengths)
