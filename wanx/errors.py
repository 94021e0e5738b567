"""Errors a user can act on. The message says what is wrong, the value seen, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class WanxError(Exception):
    """Base of every error that wanx raises on purpose; the command line prints it as one line."""

    exit_code = 1


class UsageError(WanxError):
    """An argument is outside what the command or the bundle accepts."""

    exit_code = 2


class GateError(WanxError):
    """A result was produced, but it is not accurate enough."""

    exit_code = 3


class EnvironmentMismatchError(WanxError):
    """This machine, driver or library lacks what the command needs."""

    exit_code = 4


class CorruptInputError(WanxError):
    """A file is damaged, incomplete, unsafe or not what it claims to be."""

    exit_code = 5


class CancelledError(WanxError):
    """The caller stopped the work; nothing partial was left behind."""

    exit_code = 130


def abbreviate(names: Sequence[str], most: int = 10) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable_name, names[:most])) + more


def printable_name(name: str) -> str:
    """A name out of a file, without line breaks or terminal codes."""
    return name[:160] if name.isprintable() else ascii(name[:160])
