"""What the sections of a recipe have in common: a pydantic model that takes nothing for something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Shared behaviour of all sections: closed, immutable, finite, documented by attribute docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false for numbers, which pydantic would take for 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if _has_truth_value(value) and not _takes_truth_values(annotation):
            raise ValueError("expected a value that is not true or false")
        return value


def _has_truth_value(value: Any) -> bool:
    items = [*value, *value.values()] if isinstance(value, Mapping) else value
    return any(isinstance(item, bool) for item in (items if isinstance(items, list | tuple) else [value]))


def _takes_truth_values(annotation: Any) -> bool:
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation in (bool, Any) or is_section or any(map(_takes_truth_values, get_args(annotation)))
