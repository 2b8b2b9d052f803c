"""Annotations of tensors with their shapes, `Float[Tensor, "batch length"]`: jaxtyping's, or `Tensor` without it.

The parts that need torch alone (`looped.nn`, solvers, schedules, noise levels) import them from here, so that they work
where nothing else is installed. Shapes are checked in tests only, and there jaxtyping is.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Float64 as Float64
    from jaxtyping import Int as Int
    from jaxtyping import Int64 as Int64
    from jaxtyping import Shaped as Shaped
    from jaxtyping import UInt8 as UInt8
else:
    try:
        from jaxtyping import Bool, Float, Float64, Int, Int64, Shaped, UInt8
    except ImportError:

        class Bool:
            """An annotation without a check: `Bool[Tensor, shape]` is `Tensor`."""

            def __class_getitem__(cls, item):
                return item[0]

        Float = Float64 = Int = Int64 = Shaped = UInt8 = Bool

__all__ = ["Bool", "Float", "Float64", "Int", "Int64", "Shaped", "UInt8"]
