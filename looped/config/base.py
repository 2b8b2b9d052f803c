"""Base class and number types of all sections of settings."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from looped.errors import did_you_mean

MAX_DEPTH = 100_000
"""More than any run needs; keeps a typing error such as 1e9 from filling the memory."""

Depth = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def named_or_path(names: Sequence[str]) -> AfterValidator:
    """Validator of a string: one of `names`, or the dotted path of a custom class or function."""
    def check(value: str) -> str:
        if value not in names and "." not in value:
            raise ValueError(f"'{value}' is unknown{did_you_mean(value, names)}; or give the dotted path of a custom "
                             f"one")
        return value

    return AfterValidator(check)


class Section(BaseModel):
    """A frozen group of settings that rejects unknown names."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", validate_default=True)
