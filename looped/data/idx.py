"""Reader for IDX, the file format of MNIST and similar data sets: a header of sizes, then the bytes of one array.

The header is two zero bytes, the type, the number of axes, and each axis as a big-endian 32-bit number
(yann.lecun.com/exdb/mnist). Imports no torch.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from looped.errors import UserError, one_line
from looped.tensor_types import UInt8

BYTE = 0x08
"""IDX's code for unsigned bytes, the type of all image and label files."""


def read_idx(path: Path, *, axes: int) -> UInt8[np.ndarray, "..."]:
    """The array in an IDX file of unsigned bytes with `axes` axes; gzip is recognised by its first bytes.

    Raises `UserError` for another type, number of axes or length, and for damaged gzip.
    """
    raw = _read_bytes(path)
    magic = bytes([0, 0, BYTE, axes])
    if raw[:4] != magic:
        raise UserError(f"{path} begins with {raw[:4].hex(' ') or 'nothing'}, but an IDX file of bytes with {axes} "
                        f"axes begins with {magic.hex(' ')}; check that it is the right file")
    header = 4 + 4 * axes
    shape = [int.from_bytes(raw[start : start + 4], "big") for start in range(4, header, 4)]
    size = header + math.prod(shape)
    if len(raw) < header or len(raw) != size:
        what = f"{' x '.join(map(str, shape))} bytes and a header make {size}" if len(raw) >= header else \
            f"the header alone takes {header}"
        raise UserError(f"{path} is {'cut short' if len(raw) < max(size, header) else 'too long'}: {what}, but it has "
                        f"{len(raw)}; fetch it again")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" or path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {path}: {error.strerror}; check images.path and its permissions") from None
        raise UserError(f"{path} is damaged ({one_line(error)}); fetch it again") from None
