"""Base class and number types of all sections of settings."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from looped.errors import UserError, did_you_mean

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

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As of pydantic, without checks of the values. Raises `UserError` for names that are no fields, which pydantic
        would let pass."""
        unknown = [name for name in update or {} if name not in type(self).model_fields]
        if unknown:
            raise UserError(f"{type(self).__name__} has no field '{unknown[0]}', and model_copy checks no settings; "
                            f"call config.replace(**{{'{unknown[0]}': ...}}), which does")
        return super().model_copy(update=update, deep=deep)
