"""Base of the records in a bundle's JSON files, and their problems in one line."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from wanx.config.models import ModelConfig


def printable(text: object) -> str:
    """``text`` as one line that is safe to print: control characters and the like replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


class Record(BaseModel):
    """Immutable record that takes neither unknown fields nor values of another type."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)


def first_problem(error: ValidationError, whole: str) -> str:
    """First problem of a document in one line: where, what, and the value that was found.

    Args:
        error: of the validation.
        whole: name of the document, for a problem of all of it.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or whole
    value = first["input"]
    seen = "" if isinstance(value, dict | ModelConfig) else f" (found {value!r:.60})"
    more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return printable(f"{where:.120}: {first['msg'].removeprefix('Value error, '):.240}{seen}{more}")
