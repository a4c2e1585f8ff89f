"""What all sections of a configuration share: their base, and the kinds of numbers and names in them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted here, not true or false")
    return value


# Last in each Annotated, so that limits stay limits in the JSON Schema.
NUMBER = BeforeValidator(_refuse_bool)
Int = Annotated[int, NUMBER]
Count = Annotated[int, Field(ge=1), NUMBER]
Positive = Annotated[float, Field(gt=0), NUMBER]
NotNegative = Annotated[float, Field(ge=0), NUMBER]
Beta = Annotated[float, Field(ge=0, lt=1), NUMBER]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
