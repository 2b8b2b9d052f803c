"""Philox draws are those of its authors, the same in any split of a batch and on any device, and normal."""

import pytest
import torch

from looped import philox
from looped.philox import philox4x32
from looped.rng import DeviceRandom, StepRandom

KNOWN = [  # counter, key, words: Random123's tests/kat_vectors, philox4x32 of 10 rounds
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_words_are_those_of_random123(counter, key, expected):
    assert " ".join(f"{int(word):08x}" for word in philox4x32(words(counter), words(key))) == expected


def test_a_number_is_a_function_of_its_row_and_its_place():
    whole = philox.normal(7, range(6), (5, 3), "cpu")
    parts = torch.cat([philox.normal(7, [4, 5], (5, 3), "cpu"), philox.normal(7, [0, 2], (5, 3), "cpu")])
    assert torch.equal(whole[[4, 5, 0, 2]], parts)
    longer = philox.normal(7, range(6), (40,), "cpu")
    assert torch.equal(longer[:, :15], whole.flatten(1))


def test_another_key_row_or_half_of_either_gives_other_numbers():
    draws = torch.stack([philox.normal(key, [row], (4096,), "cpu")[0]
                         for key, row in [(1, 0), (2, 0), (1 + (1 << 40), 0), (1, 1), (1, 1 << 40)]])
    correlation = torch.corrcoef(draws) - torch.eye(5)
    assert correlation.abs().max() < 4 / 64  # four standard deviations


def test_the_draws_are_standard_normal_and_their_neighbours_independent():
    draws = philox.normal(3, range(64), (4096,), "cpu").double()
    num = draws.numel()
    assert draws.mean().abs() < 4 / num**0.5
    assert (draws.square().mean() - 1).abs() < 4 * (2 / num) ** 0.5
    expected = torch.special.ndtr(draws.flatten().sort().values)
    distance = (expected - (torch.arange(num).double() + 0.5) / num).abs().max()
    assert distance < 1.95 / num**0.5  # Kolmogorov and Smirnov, one in a thousand
    for apart in (1, 2, 3, 4):
        assert (draws[:, apart:] * draws[:, :-apart]).mean().abs() < 4 / num**0.5


def test_an_odd_number_of_elements_is_drawn_in_full():
    assert philox.normal(0, [0], (), "cpu").shape == (1,)
    assert philox.normal(0, [0, 1], (7,), "cpu").isfinite().all()


@pytest.mark.slow
def test_inductor_makes_the_same_numbers():
    """Its code multiplies words with a sign as well."""
    given = torch.tensor([(1 << 62) + 12345, 0, 1, 1 << 61])
    torch.testing.assert_close(torch.compile(philox._normal, fullgraph=True)(given, 1023),
                               philox._normal(given, 1023), rtol=0, atol=2e-6)


@pytest.mark.gpu
def test_a_device_makes_the_same_numbers():
    here = DeviceRandom(0, 5, count=8).normal("state", (33, 65))
    there = DeviceRandom(0, 5, count=8, device="cuda").normal("state", (33, 65))
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=2e-6)


def test_a_micro_batch_draws_its_rows_of_the_step_and_host_draws_differ():
    whole = DeviceRandom(0, 3, count=6).normal("state", (4,))
    half = DeviceRandom(0, 3, start=3, count=3, total=6).normal("state", (4,))
    assert torch.equal(whole[3:], half)
    assert not torch.equal(whole, StepRandom(0, 3, count=6).normal("state", (4,)))
    assert not torch.equal(whole, DeviceRandom(0, 4, count=6).normal("state", (4,)))
    assert not torch.equal(whole, DeviceRandom(0, 3, count=6).normal("noise", (4,)))


def test_uniform_draws_are_the_hosts():
    """In float64, which some devices lack."""
    device, host = DeviceRandom(0, 3, count=6), StepRandom(0, 3, count=6)
    assert torch.equal(device.uniform("level", (2,)), host.uniform("level", (2,)))
    assert torch.equal(device.stratified("sigma"), host.stratified("sigma"))
