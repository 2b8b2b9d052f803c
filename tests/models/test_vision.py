"""The classifier: patches as a convolution cuts them, rows that know their place, every rule able to train it."""

import pytest
import torch

from looped.config.model import ModelConfig
from looped.data.image_batches import ImageSpec
from looped.models.language import LanguageModel
from looped.models.vision import ImageClassifier, cut
from looped.nn.masks import Full
from looped.nn.rows import Rows

SMALL = ModelConfig(width=16, num_heads=2, num_core_layers=1)
PICTURE = ImageSpec(3, 8, 12, 4)
MASK = Full()


def made(picture=PICTURE, num_classes=5):
    torch.manual_seed(0)
    return ImageClassifier(SMALL, num_classes, picture).double()


def images(num=2, picture=PICTURE):
    shape = (num, picture.channels, picture.height, picture.width)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_patches_times_a_matrix_are_a_convolution():
    model, x = made(), images()
    kernel = model.patches.weight.reshape(16, 3, 4, 4)
    convolved = torch.nn.functional.conv2d(x, kernel, model.patches.bias, stride=4)
    torch.testing.assert_close(model.patches(cut(x, 4)), convolved.flatten(2).transpose(1, 2))


def test_the_class_is_read_from_all_patches_and_from_where_they_are():
    model, x, rows = made(), images(1), Rows(mask=MASK, positions=PICTURE.positions()[None])

    def read(x):
        noise = torch.ones(1, 7, 16, dtype=torch.float64)
        return model.decode(model.unroll(model.encode(x, rows), rows, grad=2, noise=noise), rows)[0, 0]

    assert read(x).shape == (5,)
    for corner in ((0, 0), (7, 11)):
        other = x.clone()
        other[0, 0, corner[0], corner[1]] += 1
        assert not torch.allclose(read(x), read(other))
    turned = x.flip(-1)  # the same pixels elsewhere
    assert not torch.allclose(read(x), read(turned))


def test_it_is_a_language_model_but_for_what_it_reads():
    extra = set(dict(made().named_parameters())) - set(dict(LanguageModel(SMALL, 5).named_parameters()))
    assert extra == {"patches.weight", "patches.bias", "class_row"}


def test_rows_of_patches_are_on_the_scale_of_embedded_tokens():
    """So that the initial scale of the layers, which is made for tokens, fits both."""
    picture = ImageSpec(1, 32, 32, 4)
    model, x = ImageClassifier(ModelConfig(width=128), 10, picture), images(8, picture).float()
    tokens = 128**0.5 * model.embed.weight
    assert model.patches(cut(x, 4)).std().item() == pytest.approx(tokens.std().item(), rel=0.1)
