"""A method's settings from what a user gave, with errors that name the key. Knows no method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import UsageError, nearest

Config = TypeVar("Config", bound=BaseModel)


def checked(method: str, kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """`kind(**settings)`. An unknown key or a bad value is a UsageError that names it."""
    known = [field.alias or name for name, field in kind.model_fields.items()]
    for key in settings:
        if key not in known:
            raise UsageError(f"{method} has no key {key!r}.{nearest(key, known)} Keys: {', '.join(known)}.")
    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        why = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{method}: {first['loc'][0]}={first['input']!r} is not possible: {why}.") from error
