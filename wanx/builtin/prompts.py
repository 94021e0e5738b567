"""Prompts that the built-in models were trained on, and what of another prompt they do not know.

They are told beside the bundles, because readers of older versions refuse a manifest with a field
that they do not know.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

from wanx.builtin import BUILTIN, builtin_bundle
from wanx.bundle.manifest import TOKENIZER
from wanx.files.checksum import sha256_file

if TYPE_CHECKING:
    from wanx.bundle.manifest import Manifest

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
DIRECTIONS = ("left", "right", "up", "down")
BACKGROUNDS = ("black", "white", "gray", "blue")
PROMPT_HINT = (
    "a COLOUR SHAPE moving DIRECTION on a BACKGROUND background; "
    f"colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; "
    f"directions {', '.join(DIRECTIONS)}; backgrounds {', '.join(BACKGROUNDS)}"
)

_ANYWHERE = {"a", "moving", "on", "background", *SHAPES, *COLOURS, *DIRECTIONS}
_SHOWN = 3


def prompt_hint(manifest: Manifest) -> str | None:
    """Prompts that a model knows; None for one that is no built-in one nor made of one.

    Name and tokenizer tell them, which exports of the built-in models keep.
    """
    record = manifest.files.get(TOKENIZER)
    if manifest.name not in BUILTIN or record is None:
        return None
    if record.sha256 != sha256_file(builtin_bundle() / TOKENIZER):
        return None
    return PROMPT_HINT


def unknown_words(prompt: str) -> list[str]:
    """Words that no training prompt has in such a place, in order, each once.

    A colour before ``background`` has to be one of a background, elsewhere one of a shape.
    """
    words = re.findall(r"\w+", prompt.lower())
    unknown = []
    for word, following in pairwise([*words, ""]):
        if following == "background":
            if word not in BACKGROUNDS:
                unknown.append(f"{word} background")
        elif word not in _ANYWHERE:
            unknown.append(word)
    return list(dict.fromkeys(unknown))


def prompt_warning(manifest: Manifest, prompt: str) -> str | None:
    """One line about a prompt that a built-in model draws something arbitrary for, or None."""
    unknown = unknown_words(prompt)
    if not unknown or prompt_hint(manifest) is None:
        return None
    listed = ", ".join(repr(word[:32]) for word in unknown[:_SHOWN])
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    return f"{manifest.name} does not know {listed}{more}; it knows: {PROMPT_HINT}"
