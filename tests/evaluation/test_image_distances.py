"""Distances between sets of images: closed forms, scipy's root of a matrix, and the definition written out in loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from looped.errors import UserError
from looped.evaluation import image_distances
from looped.evaluation.image_distances import distances, frechet_distance, precision_recall
from looped.evaluation.image_features import Features
from looped.evaluation.image_quality import training_row


def drawn(num, dim, seed, scale=1.0, shift=0.0):
    gen = torch.Generator().manual_seed(seed)
    mixed = torch.randn(dim, dim, generator=gen, dtype=torch.float64)
    return scale * torch.randn(num, dim, generator=gen, dtype=torch.float64) @ mixed + shift


@pytest.mark.parametrize(("num", "dim"), [(200, 5), (40, 12), (8, 20)])
def test_the_frechet_distance_is_that_of_scipys_root(num, dim):
    """Also with fewer images than numbers, where covariances are singular."""
    a, b = drawn(num, dim, 0), drawn(num + 3, dim, 1, shift=0.5)
    first, second = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = sqrtm(first @ second).real
    theirs = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(first + second - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-5)


def test_the_frechet_distance_of_a_shift_and_of_a_scale_are_known():
    a = drawn(500, 6, 0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(6 * 4, rel=1e-9)
    centred = a - a.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * centred.var(0).sum().item(), rel=1e-9)


def test_precision_and_recall_are_their_definition_in_loops(monkeypatch):
    monkeypatch.setattr(image_distances, "CHUNK", 7)
    real, generated = drawn(30, 3, 0), drawn(25, 3, 1, scale=0.7, shift=0.5)

    def share(points, centres):
        hits = 0
        for point in points:
            for centre in centres:
                nearest = sorted(float((centre - other).norm()) for other in centres)[3]
                if float((point - centre).norm()) <= nearest:
                    hits += 1
                    break
        return hits / len(points)

    precision, recall = precision_recall(real, generated)
    assert (precision, recall) == (share(generated, real), share(real, generated))
    assert 0 < recall < 1


def test_a_few_copies_of_one_image_look_real_and_recall_little():
    real = drawn(100, 4, 0)
    copies = real[:1] + 1e-3 * torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    precision, recall = precision_recall(real, copies)
    assert precision == 1
    assert recall < 0.05


def test_a_figure_goes_by_the_name_of_its_features_and_what_does_not_compare_is_refused():
    real = drawn(20, 4, 0)
    found = distances(real, real, by="runs/digits-vit")
    assert (found.by, found.precision, found.recall) == ("runs/digits-vit", 1, 1)
    with pytest.raises(UserError, match="features of dimension 4 and 3 cannot be compared"):
        distances(real, real[:, :3], by="")
    with pytest.raises(UserError, match="3 generated images are too few for their 3 nearest neighbours; take 4"):
        distances(real, real[:3], by="")


@pytest.mark.usefixtures("unchecked")
def test_training_images_are_compared_class_by_class():
    """Images of a class are all alike, so of the same shares of classes the distance is nothing."""
    def part(labels):
        labels = np.array(labels)
        return SimpleNamespace(pictures=SimpleNamespace(labels=labels, pixels=labels[:, None] * np.ones((1, 4))))

    images = SimpleNamespace(train=part([0] * 8 + [1] * 4 + [2] * 2), heldout=part([0, 1, 1, 2, 0, 2]))
    row = training_row(SimpleNamespace(images=images), Features("X", lambda pixels: pixels))
    assert (row.metric, row.by, row.n) == ("frechet_distance_of_training", "X", 6)
    assert row.mean == pytest.approx(0, abs=1e-12)
    by_order = torch.from_numpy(images.train.pictures.pixels[:6])
    assert frechet_distance(torch.from_numpy(images.heldout.pictures.pixels), by_order) > 1
