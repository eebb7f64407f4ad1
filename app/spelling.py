"""How a field that is an object in JSON may also be written as text, as on the command line.

    Spelled = Annotated[Edit, as_text(read)]

The API takes JSON as its schema says and no text in place of it: it validates with `JSON` as the context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pydantic import BeforeValidator, ValidationInfo

JSON: Final = {"json": True}


def as_text(read: Callable[[str], Any]) -> BeforeValidator:
    """What `read` makes of a text is validated in its place, but for JSON. `read` raises ValueError."""

    def validate(value: Any, info: ValidationInfo) -> Any:
        return read(value) if isinstance(value, str) and info.context != JSON else value

    return BeforeValidator(validate)
