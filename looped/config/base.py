"""What every group of settings is made of: a frozen section, and the ranges that numbers may have."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_DEPTH = 100_000
"""Beyond what any run is for; a typing error such as 1e9 should not fill the memory."""

Depth = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
