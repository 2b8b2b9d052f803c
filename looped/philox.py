"""Normal draws by Philox4x32-10, a counter-based random generator: each number is a function of a key and its place.

Nothing is kept between draws, so rows can be drawn on any device, in any order and in any split of a batch. The words
are integers and equal everywhere; the normals made of them differ between devices by the rounding of log, sin and cos.
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3, and Random123's test vectors.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from looped.devices import to_device
from looped.fused_on_cuda import on_device

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
"""Added to the two words of the key from one round to the next."""
WORD = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random words of 32 bits for a counter of four words and a key of two; int64 tensors that broadcast.

    The product of two words needs unsigned 64-bit integers; int64 gives the same bits, since products wrap around and
    sign extension touches only masked bits.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        by_a, by_c = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = ((by_c >> 32) & WORD) ^ b ^ first, by_c & WORD, ((by_a >> 32) & WORD) ^ d ^ second, by_a & WORD
        first, second = (first + WEYL[0]) & WORD, (second + WEYL[1]) & WORD
    return a, b, c, d


def normal(key: int, rows: Sequence[int], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Standard normal draws, float32, shape (len(rows), *shape). `key` and `rows` are numbers of at most 63 bits. The
    counter is (a quarter of the element's index, 0, row, row's upper half)."""
    device, size = torch.device(device), math.prod(shape)
    made = on_device(_normal, device)(to_device(torch.tensor([key, *rows]), device), size)
    return made.reshape(len(rows), *shape)


def _normal(key_and_rows: Tensor, size: int) -> Tensor:
    """Normal draws, (B, size), from a key and the numbers of B rows, (1 + B,). Box and Muller make two of two words."""
    key, rows = key_and_rows[0], key_and_rows[1:].unsqueeze(1)
    places = torch.arange(-(-size // 4), device=rows.device).unsqueeze(0)
    words = philox4x32((places, torch.zeros_like(places), rows & WORD, rows >> 32), (key & WORD, key >> 32))
    numbers = [word.float() for word in words]
    pairs = []
    for length, angle in (numbers[:2], numbers[2:]):
        radius = (-2 * ((length + 1) * 2.0**-32).log()).sqrt()  # of a number in (0, 1]
        angle = angle * (2 * math.pi * 2.0**-32)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, -1).flatten(1)[:, :size]
