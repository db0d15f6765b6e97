"""What every section of the config is made of: strict keys, and numbers and names that say what they may be."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def not_a_switch(value: Any) -> Any:
    """Refuse true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


def no_zero_byte(value: str) -> str:
    """Refuse what no file system takes as a name."""
    if "\0" in value:
        raise ValueError("a name without zero bytes")
    return value


def is_import_path(value: str) -> str:
    """Refuse what is no "package.module:NAME"."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*", value):
        raise ValueError("your own as package.module:NAME")
    return value


Count = Annotated[int, Field(ge=1, strict=True)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(not_a_switch)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(not_a_switch)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(not_a_switch)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(not_a_switch)]
Name = Annotated[str, Field(min_length=1), AfterValidator(no_zero_byte)]


class Section(BaseModel):
    """Unknown keys are errors, and a loaded config does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """Take a section left empty as its defaults."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if not (value is None and is_section(cls, key))}


def is_section(owner: type[BaseModel], key: str) -> bool:
    """Return whether a key of a section holds a section of its own."""
    field = owner.model_fields.get(key)
    return bool(field and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
