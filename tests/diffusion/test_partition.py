"""Which block has which noise levels: edges and intervals in closed form, how often each is drawn, the picture."""

import math

import pytest
import torch
from scipy import stats

from looped.config import load_config
from looped.config.blocks import BlocksConfig
from looped.config.denoise import NOISE_PRESETS, NoiseConfig
from looped.diffusion import masking
from looped.diffusion.noise import interval, sample_between
from looped.diffusion.noise_from_config import block_shares, edges_of, noise_from_config
from looped.evaluation.plots import save
from looped.evaluation.plots_blocks import plot_mask_partition, plot_partition
from looped.rng import StepRandom

PAPER = noise_from_config(NoiseConfig(**NOISE_PRESETS["paper"]))
WIDE = noise_from_config(NoiseConfig(share_at_max=0.6))


def test_equal_mass_edges_are_the_papers():
    """exp(P_mean + P_std Phi^-1(q)), q evenly spaced between the CDF's values at both ends of the range."""
    top, bottom = (stats.norm.cdf((math.log(end) + 1.2) / 1.2) for end in (80.0, 0.002))
    expected = [math.exp(-1.2 + 1.2 * stats.norm.ppf(top + (bottom - top) * b / 4)) for b in range(5)]
    edges = edges_of(BlocksConfig(num=4), PAPER)
    torch.testing.assert_close(edges, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert edges.dtype == torch.float64
    assert (edges[0], edges[-1]) == (80.0, 0.002)


def test_log_uniform_edges_are_even_in_ln_sigma_and_edges_by_hand_are_kept():
    even = edges_of(BlocksConfig(num=3, partition="log-uniform"), PAPER)
    assert even.log().diff().tolist() == pytest.approx([math.log(0.002 / 80) / 3] * 3)
    by_hand = edges_of(BlocksConfig(num=3, edges=(5.0, 1.2)), PAPER)
    assert by_hand.tolist() == [80.0, 5.0, 1.2, 0.002]


@pytest.mark.parametrize("block", [0, 1, 2])
def test_levels_of_a_block_are_the_distributions_own_between_its_ends(block):
    """Their distribution function is that of a normal cut at both ends of the widened interval, by scipy."""
    edges = edges_of(BlocksConfig(num=3), PAPER)
    low, high = interval(block, edges, 0.1)
    uniform = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
    sigma = sample_between(PAPER, low, high, uniform)
    ends = [(math.log(end) + 1.2) / 1.2 for end in (low, high)]
    expected = torch.from_numpy(stats.truncnorm(*ends, loc=-1.2, scale=1.2).ppf(uniform.numpy())).exp()
    torch.testing.assert_close(sigma, expected, rtol=1e-6, atol=0)
    a = (edges[block] / edges[block + 1]).item() ** 0.1
    assert low == pytest.approx(max(edges[block + 1].item() / a, 0.002))
    assert high == pytest.approx(min(edges[block].item() * a, 80.0))


def test_the_atom_at_sigma_max_is_the_first_blocks():
    config = BlocksConfig(num=4, choose="mass")
    assert block_shares(config, WIDE).tolist() == pytest.approx([0.6 + 0.1, 0.1, 0.1, 0.1])
    assert block_shares(BlocksConfig(num=4), WIDE).tolist() == [0.25] * 4
    low, high = interval(0, edges_of(config, WIDE), 0.0)
    levels = sample_between(WIDE, low, high, StepRandom(0, 0, count=700).stratified("sigma"))
    assert int((levels == WIDE.sigma_max).sum()) == 600


def test_the_picture_of_a_partition(tmp_path):
    for name, num in (("paper", 4), ("wide", 8)):
        config = load_config(None, {"objective": "blockwise", "denoise.noise": name, "blocks.num": num,
                                    "model.num_core_layers": num})
        plot_partition(config.blocks, noise_from_config(config.denoise.noise), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("schedule", "expected"), [
    ("linear", lambda m: torch.ones_like(m)),
    ("cosine", lambda m: 2 / math.pi / (1 - m.square()).sqrt())])  # m = cos(pi / 2 (1 - t))
def test_the_picture_of_hidden_shares_draws_their_density(tmp_path, monkeypatch, schedule, expected):
    kept = []
    monkeypatch.setattr("looped.evaluation.plots_blocks.save",
                        lambda figure, axes, path, save=save: (kept.append(axes), save(figure, axes, path)))
    plot_mask_partition(BlocksConfig(num=3), schedule, tmp_path / "partition.png")
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")
    for line in kept[0].lines[:3]:
        m, density = (torch.tensor(values) for values in line.get_data())
        inside = m < 0.98  # at 1 the cosine's density is infinite
        torch.testing.assert_close(density[inside], expected(m[inside]), rtol=2e-3, atol=0)
    shares = [float(text.get_text().split("\n")[1]) for text in kept[0].texts]
    assert shares == pytest.approx(masking.block_times(schedule, 3).tolist(), abs=6e-4)
