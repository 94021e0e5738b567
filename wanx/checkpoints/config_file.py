"""A config.json of a checkpoint, read value by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanx.errors import CorruptInputError, UsageError
from wanx.files.input_file import read_json_object

_MAX_SIZE = 1 << 24
_MAX_NUMBER = 1e30


class ConfigFile:
    """A config.json whose values are checked as they are taken."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            CorruptInputError: it is missing or not a JSON object.
        """
        self.path = path
        self.values = read_json_object(path)

    def size(self, key: str) -> int:
        """A positive integer."""
        value: Any = self.values.get(key)
        if type(value) is not int or not 0 < value <= _MAX_SIZE:
            raise self._unexpected_value(key, "a positive integer")
        return value

    def sizes(self, key: str, *, minimum: int = 1) -> tuple[int, ...]:
        """A list of integers of at least ``minimum``."""
        value: Any = self.values.get(key)
        if not isinstance(value, list) or not all(
            type(v) is int and minimum <= v <= _MAX_SIZE for v in value
        ):
            raise self._unexpected_value(key, f"a list of integers from {minimum}")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value: Any = self.values.get(key)
        if not isinstance(value, list) or not all(
            type(v) in (int, float) and abs(v) < _MAX_NUMBER for v in value
        ):
            raise self._unexpected_value(key, "a list of numbers")
        return tuple(map(float, value))

    def epsilon(self, key: str) -> float:
        """A small positive number."""
        value: Any = self.values.get(key)
        if type(value) not in (int, float) or not 0 < value < 1:
            raise self._unexpected_value(key, "a number between 0 and 1")
        return float(value)

    def flags(self, key: str) -> tuple[bool, ...]:
        """A list of booleans."""
        value: Any = self.values.get(key)
        if not isinstance(value, list) or not all(type(v) is bool for v in value):
            raise self._unexpected_value(key, "a list of booleans")
        return tuple(value)

    def require(self, key: str, *accepted: Any) -> None:
        """Refuse a value that wanx has no network for; an absent key is accepted.

        Raises:
            UsageError: the value is none of ``accepted``.
        """
        if key in self.values and self.values[key] not in accepted:
            choices = " or ".join(map(repr, accepted))
            raise UsageError(
                f"{self.path}: {key} = {self._printable_value(key)} is not supported, only "
                f"{choices}; use a Wan2.1 checkpoint"
            )

    def _printable_value(self, key: str) -> str:
        return repr(self.values.get(key))[:80]

    def _unexpected_value(self, key: str, expected: str) -> CorruptInputError:
        return CorruptInputError(
            f"{self.path}: {key} = {self._printable_value(key)} is not {expected}; download the "
            "file again"
        )
