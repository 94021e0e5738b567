"""Amounts of memory as the user says them."""

from __future__ import annotations

import re

from wanx.errors import UsageError

_UNITS = {"K": 10, "M": 20, "G": 30}  # powers of two
_LEAST_BUDGET = 1 << 20  # a plain number below was hardly meant in bytes


def parse_memory(text: str, *, default_unit: str = "") -> int:
    """Bytes of ``4G``, ``512M`` or ``64K``; 0 of what is no size.

    Args:
        text: digits, and a unit that may be missing.
        default_unit: the unit that it then has; empty for bytes.
    """
    match = re.fullmatch(r"(\d{1,15})([KMG]?)", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None:
        return 0
    return int(match[1]) << _UNITS.get(match[2].upper() or default_unit, 0)


def parse_budget(option: str, text: str) -> int:
    """Bytes of an option such as ``--memory 12G``, ``512M`` or ``12884901888``.

    Raises:
        UsageError: it is no such size.
    """
    size = parse_memory(text)
    if size < _LEAST_BUDGET:
        raise UsageError(
            f"{option} {text:.40} is not a size; give one such as 12G, 512M or 12884901888"
        )
    return size
