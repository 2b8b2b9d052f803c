"""MAUVE is the authors' figure: near 1 for one distribution, near 0 for two that share nothing; a run's features are
what its head reads."""

import sys

import pytest
import torch

from looped.config import load_config
from looped.errors import UserError
from looped.evaluation.mauve import Encoder, RunEncoder, mauve, mauve_rows
from looped.models.build import build
from looped.objectives import build_objective


def drawn(seed, num=400, width=12, shift=0.0):
    features = torch.randn(num, width, generator=torch.Generator().manual_seed(seed))
    return features + shift


def test_one_distribution_scores_high_and_another_low():
    same, near, far = (mauve(drawn(0, shift=2.0), drawn(1, shift=shift)) for shift in (2.0, 1.0, -2.0))
    assert same > 0.9
    assert far < 0.05
    assert far < near < same


def test_it_is_the_authors_figure():
    from mauve import compute_mauve

    real, written = drawn(0), drawn(1, shift=0.5)
    theirs = compute_mauve(p_features=real.numpy(), q_features=written.numpy(), seed=3).mauve
    assert mauve(real, written, seed=3) == theirs
    assert mauve(real, written, seed=3) != mauve(real, written, seed=4)


class Lengths:
    """An encoder that sees how long a text is and how many of its letters are an a."""

    name = "lengths"

    def features(self, texts):
        return torch.tensor([[float(len(text)), float(text.count("a"))] for text in texts])


def test_rows_name_their_encoder_and_how_many_texts_there_are():
    real = ["ab" * (i % 9 + 1) for i in range(60)]
    rows = mauve_rows(Lengths(), real, {1: real[::-1], 4: ["b" * (i % 9 + 1) for i in range(60)]})
    assert [(row.metric, row.depth, row.by, row.n) for row in rows] == [("mauve", 1, "lengths", 60),
                                                                       ("mauve", 4, "lengths", 60)]
    assert rows[0].mean > rows[1].mean
    assert "ci_low" not in rows[0].as_dict()


def make(objective):
    config = load_config(None, {"objective": objective, "model.width": 16, "model.num_heads": 2})
    return build_objective(config, build(config, 256)).double()


@torch.no_grad()
def test_the_features_of_a_run_are_what_its_head_reads_at_the_last_token():
    objective = make("truncated")
    encoder = RunEncoder("run", objective, 3, lambda text: list(text.encode()))
    assert isinstance(encoder, Encoder)
    features = encoder.features(["abc", "a longer one", ""])
    objective.model.recurrence.state_init = "zero"
    features = encoder.features(["abc", "a longer one", ""])
    logits = objective.model(torch.tensor([list(b"a longer one")]), 3)[0, -1]
    torch.testing.assert_close(features[1].double() @ objective.model.head_weight.T, logits, rtol=1e-5, atol=1e-5)


def test_a_denoiser_is_no_encoder():
    with pytest.raises(UserError, match="is a denoiser"):
        RunEncoder("run", make("denoise"), 1, list)


def test_without_the_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(UserError, match=r"pip install 'looped\[mauve\]'"):
        mauve(drawn(0), drawn(1))
