"""The tokenizer of the tiny model: a hand-built Unigram vocabulary in umT5's form.

A trained Unigram falls apart into near-characters on so small a corpus, so the words of the
captions are listed, and every printable ASCII character is there for whatever else a prompt has.

    python tools/tiny/vocabulary.py tokenizer.json
"""

from __future__ import annotations

import string
import sys
from pathlib import Path

from data import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

SPECIALS = ("<pad>", "</s>", "<unk>")
SPACE = "▁"
WORDS = tuple(dict.fromkeys((
    "a", "moving", "on", "background", *SHAPES, *COLOURS, *DIRECTIONS, *BACKGROUNDS,
)))  # fmt: skip
CHARACTERS = tuple(c for c in string.printable if not c.isspace() and not c.isupper())
WORD_SCORE = -1.0
CHARACTER_SCORE = -10.0


def pieces() -> list[tuple[str, float]]:
    """Vocabulary in id order, with log probabilities: pad 0, eos 1, unk 2, words, characters."""
    words = [(SPACE + word, WORD_SCORE) for word in WORDS]
    characters = [(character, CHARACTER_SCORE) for character in (SPACE, *CHARACTERS)]
    return [(special, 0.0) for special in SPECIALS] + words + characters


def build_tokenizer() -> Tokenizer:
    """Lower-cases, splits like T5 (metaspace), and appends ``</s>``."""
    tokenizer = Tokenizer(Unigram(pieces(), unk_id=SPECIALS.index("<unk>"), byte_fallback=False))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


if __name__ == "__main__":
    destination = Path(sys.argv[1])
    destination.parent.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(destination))
    print(f"{destination}: {len(pieces())} pieces")
