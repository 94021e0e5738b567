"""Errors a user can act on. The message says what is wrong, the value seen, and what to do."""

from __future__ import annotations


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
