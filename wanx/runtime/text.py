"""Prompts: cleaning, token ids, and the padded features that the transformer attends to."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.errors import CorruptInputError, UsageError
from wanx.runtime.native_call import NativeError, call_native, one_line, silenced_stderr
from wanx.runtime.sessions.base import Session

TEXT_LEN = 512
ENCODING_SECONDS = 60.0  # for the longest prompt, of ``PROMPT_BYTES``
PROMPT_BYTES = 2**20


def check_prompt(text: str) -> None:
    """Refuse a prompt that no tokenizer can take; an empty one is allowed and means "anything".

    Raises:
        UsageError: The text holds a NUL character or bytes that were not UTF-8 (they arrive from
            the command line as lone surrogates), or is longer than ``PROMPT_BYTES`` in UTF-8.
    """
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt is not valid UTF-8 at character {error.start} "
            f"(U+{ord(text[error.start]):04X}); save or type it as UTF-8"
        ) from None
    if "\0" in text:
        raise UsageError(
            f"the prompt holds a NUL character at position {text.index(chr(0))}; remove it"
        )
    if size > PROMPT_BYTES:
        raise UsageError(
            f"the prompt is {size:,} bytes long and at most {PROMPT_BYTES:,} are accepted; "
            f"only its first {TEXT_LEN} tokens would be used"
        )


def clean_prompt(text: str) -> str:
    """Normalise a prompt as Wan2.1 was trained on: repair mojibake, unescape HTML, squeeze blanks.

    HTML is unescaped twice because the captions came out of pages that had escaped it twice.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


class PromptTokenizer:
    """The tokenizer of a bundle, read from its ``tokenizer.json``.

    The end token comes from the file's post-processor. The file's own truncation and padding are
    ignored: ``encode`` alone decides the length.

    Raises:
        CorruptInputError: The file is missing or unreadable, is no tokenizer, has no ``<pad>``
            token, or has no post-processor that adds the end token the text encoder expects.
    """

    def __init__(self, path: Path) -> None:
        # There is one prompt at a time; with threads the library warns when the process forks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer

        try:
            with silenced_stderr():
                self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CorruptInputError(
                f"cannot read {path}: {error.strerror}; export the bundle again"
            ) from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the library raises bare Exception; a panic is not even one
            raise CorruptInputError(
                f"{path} is not a tokenizer ({one_line(error)}); export the bundle again"
            ) from None
        self._path = path
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._added = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        pad = self._tokenizer.token_to_id("<pad>")
        if pad is None or self._added == 0:
            missing = "<pad> token" if pad is None else "post-processor that adds an end token"
            raise CorruptInputError(f"{path} has no {missing}; export the bundle again")
        self._pad = int(pad)

    def count(self, prompt: str) -> int:
        """Count the tokens of one cleaned prompt at its whole length, the end token included."""
        return len(self._encoded(prompt)) + self._added

    def encode(
        self, prompt: str, max_length: int = TEXT_LEN
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Encode one cleaned prompt, cut and padded to ``max_length`` tokens.

        A prompt that is too long loses its last words, never the end token.

        Returns:
            Token ids and mask, both int64 [1, max_length]; the mask is 1 on words and end token.

        Raises:
            CorruptInputError: The tokenizer cannot encode the prompt, or not in
                ``ENCODING_SECONDS``.
        """
        assert max_length > self._added

        def cut(encoding: Any) -> Any:
            encoding.truncate(max_length - self._added)
            return self._tokenizer.post_process(encoding)

        words = self._encoded(prompt, cut).ids
        ids = np.full((1, max_length), self._pad, dtype=np.int64)
        ids[0, : len(words)] = words
        mask = (np.arange(max_length) < len(words)).astype(np.int64)[None]
        return ids, mask

    def _encoded(self, prompt: str, then: Callable[[Any], Any] = lambda encoding: encoding) -> Any:
        def encode() -> Any:
            # Unlike encode, a batch releases Python's lock.
            (encoding,) = self._tokenizer.encode_batch([prompt], add_special_tokens=False)
            return then(encoding)

        try:
            return call_native(encode, ENCODING_SECONDS)
        except NativeError as error:
            raise CorruptInputError(
                f"{self._path} cannot encode the prompt ({error}); get the tokenizer.json that "
                "belongs to the model, and export again"
            ) from None


def zero_pad(
    embedding: NDArray[np.floating], length: int = TEXT_LEN, *, tokens: int | None = None
) -> NDArray[np.floating]:
    """Keep the rows of real tokens and follow them by zeros.

    The transformer attends to the zero rows unmasked, so they are part of the numerics.

    Args:
        embedding: Output of the text encoder, [n, d].
        length: Rows of the result.
        tokens: How many leading rows are real, that is ``mask.sum()``; all of them by default.

    Returns:
        [length, d], of the type of ``embedding``.
    """
    real = embedding[:tokens]
    assert len(real) <= length
    padded = np.zeros((length, embedding.shape[1]), dtype=embedding.dtype)
    padded[: len(real)] = real
    return padded


def encode_prompt(
    session: Session, tokenizer: PromptTokenizer, prompt: str, text_len: int
) -> NDArray[np.float32]:
    """Turn a prompt into the padded features that the transformer attends to.

    Args:
        session: The text encoder: ``ids`` int64 [1, n] to ``features`` [1, n, text_dim].
        tokenizer: Of the same bundle.
        prompt: As the user wrote it; it is cleaned here.
        text_len: Rows of the result.

    Returns:
        float32 [1, text_len, text_dim].

    Raises:
        WanxError: The backend failed.
    """
    ids, mask = tokenizer.encode(clean_prompt(prompt), text_len)
    # Padding is masked in T5, so leaving it out gives the same features for less.
    features = session.run({"ids": ids[:, : int(mask.sum())]})["features"]
    return zero_pad(features[0], text_len)[None].astype(np.float32)
