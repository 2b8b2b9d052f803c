"""Edges between blocks as a run has measured them: equal shares of the rise of its cross-entropy."""

from itertools import pairwise

import numpy as np
import pytest

from looped.config import load_config
from looped.diffusion.noise import Adaptive, partition
from looped.diffusion.noise_from_config import edges_of, noise_from_config
from looped.errors import UserError
from looped.training.block_edges import with_measured_edges
from looped.training.runs import load_run
from looped.training.train import train

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

PILOT = {"objective": "denoise", "denoise.noise.distribution": "adaptive", "training.budget": 16,
         "training.batch_size": 128, "data.length": 4, "optim.lr": 0.02, "optim.warmup_steps": 0,
         "evaluation.depths": [1], "evaluation.num_samples": 1, "evaluation.sample_length": 2,
         "evaluation.prompt_length": 2}


@pytest.fixture(scope="module")
def pilot(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("edges") / "pilot"
    train(tiny(**PILOT), run)
    return run


@pytest.fixture
def blocks(tiny, pilot):
    """Settings -> a config of three blocks whose edges the pilot has measured."""
    base = {"objective": "blockwise", "blocks.num": 3, "model.num_core_layers": 3, "blocks.edges_from": str(pilot),
            "training.budget": 2, "evaluation.depths": [3], "evaluation.num_samples": 1}
    return lambda **changes: tiny(**base | changes)


def test_every_block_has_the_same_share_of_the_measured_rise(pilot, blocks):
    config, learned = with_measured_edges(blocks()), load_run(pilot).objective.noise.continuous
    assert isinstance(learned, Adaptive)
    shares = -learned.cdf(edges_of(config.blocks, noise_from_config(config.denoise.noise))).diff()
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=1e-4)
    levels = [learned.sigma_max, *config.blocks.edges, learned.sigma_min]
    by_hand = [(1 - learned.floor) * rise + learned.floor * width for rise, width in (
        _rise_and_width(learned, low, high) for high, low in pairwise(levels))]
    assert by_hand == pytest.approx([1 / 3] * 3, abs=1e-4)
    by_mass = edges_of(blocks(**{"blocks.edges_from": None}).blocks, noise_from_config(config.denoise.noise))
    assert by_mass[1:-1].tolist() != pytest.approx(list(config.blocks.edges), rel=0.05)  # positive control


def _rise_and_width(learned, low, high):
    """Between two levels, as shares of the whole: the rise of the cross-entropy, straight between nodes; ln sigma."""
    loss, nodes = learned.cross_entropy().numpy(), np.linspace(learned.x_min, learned.x_max, learned.num_bins + 1)
    ends = np.log([low, high])
    return (float(np.diff(np.interp(ends, nodes, loss))[0] / (loss[-1] - loss[0])),
            float(np.diff(ends)[0] / (nodes[-1] - nodes[0])))


def test_the_run_keeps_the_edges_and_needs_the_pilot_no_more(blocks, tmp_path):
    train(blocks(), tmp_path / "run")
    kept = load_config(tmp_path / "run/config.yaml").blocks
    assert kept.edges_from is None
    assert kept.edges == with_measured_edges(blocks()).blocks.edges
    again = train(blocks(), tmp_path / "run")  # the same command goes on with the same run
    assert again.step == 2
    assert load_run(tmp_path / "run").objective.denoiser.edges[1:-1].tolist() == list(kept.edges)


@pytest.mark.parametrize(("changes", "message"), [
    ({"denoise.noise.distribution": "log-uniform"}, "has no measured cross-entropy; give a run with objective denoise"),
    ({"objective": "full"}, "has no measured cross-entropy"),
    ({"training.budget": 1, "training.batch_size": 2}, "has seen one of its noise levels 0 times, and 8 are needed"),
    ({"denoise.noise.sigma_max": 40.0}, "has sigma_max 40, and denoise.noise.sigma_max is"),
])
def test_a_run_that_has_measured_nothing_of_use_is_refused(tiny, blocks, tmp_path, changes, message):
    train(tiny(**PILOT | changes), tmp_path / "other")
    with pytest.raises(UserError, match=message):
        with_measured_edges(blocks(**{"blocks.edges_from": str(tmp_path / "other")}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"blocks.edges": [2.0, 1.0]}, "edges_from .* and edges .* are both set; keep one of them"),
    ({"objective": "full", "recurrence.mean": 3}, "edges_from .* is for objective blockwise, and objective is full"),
])
def test_settings_that_would_not_be_read_are_refused(blocks, changes, message):
    with pytest.raises(UserError, match=message):
        blocks(**changes)


def test_edges_that_are_still_to_be_measured_are_no_others(blocks):
    config = blocks()
    noise = noise_from_config(config.denoise.noise)
    with pytest.raises(UserError, match=r"is not read here; set blocks\.edges to the edges"):
        edges_of(config.blocks, noise)
    assert len(partition(noise, 3)) == 4
