"""Another user than root, whom no permission stops."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_root() -> Iterator[None]:
    """Act as nobody where root would be acting."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
