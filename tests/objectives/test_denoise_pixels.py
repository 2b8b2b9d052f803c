"""Denoising of pixels as a training rule: which block learns, what is hidden, and that it learns the class."""

import pytest
import torch

from looped.config import load_config
from looped.data.image_batches import ImageSpec, SoughtImages
from looped.diffusion.noise import interval
from looped.errors import UserError
from looped.models.build import build
from looped.objectives import build_objective
from looped.rng import StepRandom
from looped.training.optim import build_optimizers

PICTURE = ImageSpec(1, 4, 4, 2)
SMALL = {"images.source": "digits", "images.goal": "generate", "objective": "denoise", "model.width": 16,
         "model.num_heads": 2, "model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.num_core_layers": 3,
         "model.injection": "none", "denoise.cond_width": 16, "denoise.context": "inject", "denoise.weight": "edm",
         "denoise.noise": "paper"}
BLOCKS = {"objective": "blockwise", "blocks.num": 3}


def make(picture=PICTURE, num_classes=3, **flags):
    config = load_config(None, SMALL | flags)
    objective = build_objective(config, build(config, num_classes, picture)).train()
    with torch.no_grad():  # the last map starts at zero, and gives no gradient to what is before it
        objective.model.pixels.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return objective


def batch(num=8):
    gen = torch.Generator().manual_seed(1)
    return SoughtImages(torch.randn(num, 1, 4, 4, generator=gen), torch.arange(num) % 3, 4)


def test_the_active_block_alone_gets_a_gradient_on_levels_of_its_own():
    objective = make(**BLOCKS)
    seen = set()
    for step in range(8):
        block, random = objective.sample_block(StepRandom(0, step, count=8)), StepRandom(0, step, count=8)
        low, high = interval(block, objective.denoiser.edges, 0.05)
        sigma = objective.levels_of(block, random)
        assert low <= sigma.min() <= sigma.max() <= high
        objective(batch(), random).value.backward()
        for number, other in enumerate(objective.model.recurrence.core.blocks):
            assert all((p.grad is not None) == (number == block) for p in other.parameters())
        assert all(p.grad is not None for p in objective.shared_parameters())
        objective.zero_grad()
        seen.add(block)
    assert seen == {0, 1, 2}


def test_in_evaluation_mode_the_loss_is_that_of_all_blocks():
    objective, random = make(**BLOCKS).eval(), StepRandom(0, 0, count=8)
    loss = objective(batch(), random)
    each = [objective.loss_at(batch(), objective.levels_of(b, random), random, block=b).value for b in range(3)]
    torch.testing.assert_close(loss.value, torch.stack(each).mean())
    assert [loss.metrics[f"loss_block{b}"].item() for b in range(3)] == pytest.approx([e.item() for e in each])


def test_blocks_and_their_twin_have_the_same_layers_and_cost_by_those_that_run():
    twin, blocks = make(), make(**BLOCKS)
    assert twin.layer_forwards() == 9
    assert blocks.layer_forwards() == 3
    ours, theirs = (sum(p.numel() for p in o.parameters()) for o in (blocks, twin))
    assert ours == theirs


def test_an_untouched_model_begins_at_a_loss_of_one():
    objective = make(picture=ImageSpec(1, 4, 4, 2, deviation=0.25))
    with torch.no_grad():
        objective.model.pixels.weight.zero_()
    images = SoughtImages(0.25 * torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(1)),
                          torch.zeros(2000, dtype=torch.long), 4)
    loss = objective(images, StepRandom(0, 0, count=2000))
    assert loss.value.item() == pytest.approx(1, abs=0.03)
    assert all(value.item() == pytest.approx(1, abs=0.15) for name, value in loss.metrics.items() if "bin" in name)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_as_many_classes_are_hidden_as_the_setting_says(share):
    objective = make(**{"images.label_dropout": share})
    labels = torch.arange(2000) % 3
    shown = objective.shown(labels, StepRandom(0, 0, count=2000))
    hidden = shown == 3
    assert hidden.double().mean().item() == pytest.approx(share, abs=0.04)
    assert torch.equal(shown[~hidden], labels[~hidden])


def test_images_that_are_their_class_are_learned_block_by_block(unchecked):
    """Each class is one image, which is the exact D at any level, however much noise there is."""
    noise = {"distribution": "log-uniform", "sigma_min": 0.2, "sigma_max": 10.0, "share_at_max": 0.3}
    objective = make(**BLOCKS | {"blocks.num": 2, "model.num_core_layers": 2, "images.label_dropout": 0.0,
                                 "denoise.noise": noise})
    shapes = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(12) % 3
    images = SoughtImages(shapes[labels], labels, 4)
    (optimizer,) = build_optimizers(objective, load_config(None, SMALL | {"optim.lr": 1e-2}).optim)
    for step in range(140):
        objective(images, StepRandom(0, step, count=12)).value.backward()
        optimizer.step()
        optimizer.zero_grad()
    objective.eval()
    z = 10 * torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        D = objective.denoiser(z, torch.full((3,), 10.0, dtype=torch.float64), torch.arange(3))
    assert (D - shapes).square().mean() < 0.3 * shapes.square().mean()


@pytest.mark.parametrize(("flags", "why"), [
    ({"objective": "full"}, "images.goal generate is trained by denoising, and objective is full; set objective to "),
    ({"model.injection": "linear"}, "model.injection linear does not fit images.goal generate: the class .* none"),
    ({"model.num_prelude_layers": 1}, "model.num_prelude_layers 1 .* set it to 0"),
    ({"denoise.start": "zero"}, "one image per class; set it to noise"),
    ({"denoise.carry": "estimate"}, "denoise.carry estimate"),
    ({"denoise.noise.distribution": "adaptive"}, "set it to log-normal"),
    ({"blocks.shared": "frozen", **BLOCKS}, "blocks.shared frozen .* starts at zero"),
    ({"images.source": None}, "no images to learn from; set images.source"),
    ({"blocks.num": 3}, "set objective to blockwise, or blocks.num to 1")])
def test_settings_that_do_not_go_with_it_are_refused_in_a_sentence(flags, why):
    with pytest.raises(UserError, match=why) as error:
        load_config(None, SMALL | flags)
    assert "\n" not in str(error.value)
