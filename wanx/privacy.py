"""Telemetry of dependencies, which is off unless the user allows it."""

from __future__ import annotations

import os

ALLOWED = "WANX_ALLOW_TELEMETRY"
# ONNX Runtime asks for exactly 1, when it is imported; Hugging Face's libraries ask before they
# add a description of the machine to a request.
SWITCHES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")


def disable_telemetry() -> None:
    """Switch it off for this process and those it starts; see docs/security.md.

    Has to come before the first import of a library that it is about.
    """
    if os.environ.get(ALLOWED) != "1":
        os.environ.update(dict.fromkeys(SWITCHES, "1"))
