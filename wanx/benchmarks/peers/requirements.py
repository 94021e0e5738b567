"""Requirements of a peer, checked without importing anything heavy."""

from __future__ import annotations

from importlib.util import find_spec

from wanx.bundle.reader import Bundle
from wanx.errors import EnvironmentMismatchError, UsageError

PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def require_peer(bundle: Bundle) -> None:
    """Check that the peer can do what a bundle is for.

    Raises:
        EnvironmentMismatchError: packages are missing.
        UsageError: the bundle is not for text-to-video.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise EnvironmentMismatchError(
            f"--peer diffusers needs {', '.join(missing)}, which this environment lacks: "
            "pip install 'wanx[peers]'"
        )
    task = bundle.manifest.task
    if task != "t2v":
        raise UsageError(
            f"--peer diffusers runs text-to-video only so far, and {bundle.root.name} is for "
            f"{task}; leave --peer out"
        )
