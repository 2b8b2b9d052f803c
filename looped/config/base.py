"""The parts of every group of settings: a frozen section, and the ranges that numbers may have."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from looped.errors import did_you_mean

MAX_DEPTH = 100_000
"""Beyond what any run is for; a typing error such as 1e9 should not fill the memory."""

Depth = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def named_or_path(names: Sequence[str]) -> AfterValidator:
    """A check of a text: one of some names, or the dotted path of a class or function of one's own."""
    def check(value: str) -> str:
        if value not in names and "." not in value:
            raise ValueError(f"'{value}' is unknown{did_you_mean(value, names)}; or give the dotted path of one's own")
        return value

    return AfterValidator(check)


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", validate_default=True)
