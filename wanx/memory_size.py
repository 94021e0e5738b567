"""Amounts of memory as the user says them."""

from __future__ import annotations

import re

_UNITS = {"K": 10, "M": 20, "G": 30}  # powers of two


def parse_memory(text: str, *, plain: str = "") -> int:
    """Bytes of ``4G``, ``512M`` or ``64K``; 0 of what is no size.

    Args:
        text: digits, and a unit that may be missing.
        plain: the unit that it then has; empty for bytes.
    """
    found = re.fullmatch(r"(\d{1,15})([KMG]?)", text.strip(), re.ASCII | re.IGNORECASE)
    if found is None:
        return 0
    return int(found[1]) << _UNITS.get(found[2].upper() or plain, 0)
