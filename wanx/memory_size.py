"""Amounts of memory as the user says them."""

from __future__ import annotations

import re

_UNITS = {"K": 10, "M": 20, "G": 30}  # powers of two


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
