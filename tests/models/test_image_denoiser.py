"""The Diffusion Transformer: patches there and back, nothing at first, and everything it is told matters later."""

import pytest
import torch

from looped.config.model import ModelConfig
from looped.data.image_batches import ImageSpec
from looped.models.image_denoiser import ImageDenoiser
from looped.models.language import Structure
from looped.models.vision import cut, join

SMALL = ModelConfig(width=16, num_heads=2, num_core_layers=2, num_prelude_layers=0, num_coda_layers=0,
                    injection="none")
PICTURE = ImageSpec(3, 8, 12, 4)


def made(**options):
    torch.manual_seed(0)
    return ImageDenoiser(SMALL, 5, PICTURE, Structure(cond_width=8, **options)).double()


def woken(**options):
    """Every weight at random: what starts at zero would hide what it is given."""
    model = made(**options)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    return model


def images(num=2):
    return torch.randn(num, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LEVEL, LABELS = torch.tensor([0.3, -1.0], dtype=torch.float64), torch.tensor([1, 5])


def test_join_undoes_cut():
    assert torch.equal(join(cut(images(), 4), PICTURE), images())


def test_it_answers_zero_at_first_whatever_the_input():
    assert torch.equal(made()(images(), LEVEL, LABELS), torch.zeros(2, 3, 8, 12, dtype=torch.float64))


def test_pixels_elsewhere_the_level_and_the_class_change_what_each_patch_reads():
    model = woken()
    read = model(images(), LEVEL, LABELS)
    corner = images()
    corner[:, 0, 0, 0] += 1
    changes = [model(corner, LEVEL, LABELS), model(images(), LEVEL + 0.1, LABELS),
               model(images(), LEVEL, torch.tensor([2, 0]))]
    for changed in changes:
        assert ((changed - read).abs().flatten(2).amax(-1) > 1e-6).all()
    torch.testing.assert_close(model(images()[:1], LEVEL[:1], LABELS[:1]), read[:1])  # images do not see each other


def test_places_are_told_apart_where_all_patches_are_alike():
    """Under the highest noise the input says nothing, and the answer is still an image."""
    model = woken()
    flat = model(torch.zeros(2, 3, 8, 12, dtype=torch.float64), LEVEL, LABELS)
    patches = cut(flat, 4)[0]
    assert torch.cdist(patches, patches).fill_diagonal_(1).min() > 1e-4
    with torch.no_grad():
        model.place.zero_()  # positive control: rotation alone
    patches = cut(model(torch.zeros(2, 3, 8, 12, dtype=torch.float64), LEVEL, LABELS), 4)[0]
    assert torch.cdist(patches, patches).max() < 1e-9


@pytest.mark.parametrize("block", [0, 1])
def test_one_block_of_several_is_at_work(block):
    model = woken(core_layers=[1, 1])
    read = model(images(), LEVEL, LABELS, block=block)
    with torch.no_grad():
        for parameter in model.recurrence.core.blocks[1 - block].parameters():
            parameter.add_(1.0)
    assert torch.equal(model(images(), LEVEL, LABELS, block=block), read)
    with torch.no_grad():
        for parameter in model.recurrence.core.blocks[block].parameters():
            parameter.add_(1.0)
    assert not torch.allclose(model(images(), LEVEL, LABELS, block=block), read)
