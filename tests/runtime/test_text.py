"""Prompts against diffusers and transformers, on a small unigram vocabulary made here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5TokenizerFast

from wanx.errors import CorruptInputError, UsageError
from wanx.runtime import text as text_module
from wanx.runtime.text import PROMPT_BYTES, PromptTokenizer, check_prompt, clean_prompt, zero_pad

WORDS = ["a", "red", "circle", "mov", "ing", "right", "on", "blue", "back", "ground", "猫", "é"]
PIECES = [*WORDS, *("▁" + word for word in WORDS), *"bcdefghijklmnopqrstuvwxyz", "▁"]
PROMPTS = [
    "",
    "a red circle moving right on a blue background",
    "-y --help",
    "猫 é ☃ unknown",
    "a </s> b <pad> c <unk> <extra_id_0>",
    "   a   red  ",
    "ﬁne A RED",
]


def small_tokenizer(path: Path, *, post_processor: bool = True, **sections: Any) -> Path:
    """Write a tokenizer.json like umT5's: unigram, <pad> 0, </s> 1, <unk> 2."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -1.0 - len(piece) ** -1.0 - i / 100) for i, piece in enumerate(PIECES)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    content = json.loads(tokenizer.to_str()) | sections
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def peer_encode(peer: Any, prompt: str, length: int) -> tuple[Any, Any]:
    encoded = peer(
        [prompt], padding="max_length", truncation=True, max_length=length,
        add_special_tokens=True, return_attention_mask=True, return_tensors="np",
    )  # fmt: skip
    return encoded["input_ids"], encoded["attention_mask"]


@pytest.mark.parametrize("length", [2, 5, 12, 512])
@pytest.mark.parametrize("prompt", [*PROMPTS, "a red circle " * 300, "x" * 2000])
def test_encoding_equals_transformers(tokenizer_json: Path, prompt: str, length: int) -> None:
    peer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_json), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    ids, mask = PromptTokenizer(tokenizer_json).encode(prompt, length)
    expected_ids, expected_mask = peer_encode(peer, prompt, length)
    assert (ids.dtype, ids.shape) == (np.int64, (1, length))
    assert (mask.dtype, mask.shape) == (np.int64, (1, length))
    assert np.array_equal(ids, expected_ids)
    assert np.array_equal(mask, expected_mask)
    assert ids[0, mask.sum() - 1] == 1


@pytest.mark.parametrize("length", [7, 512])
@pytest.mark.parametrize("prompt", [*PROMPTS, "a red circle " * 300])
def test_encoding_equals_the_t5_tokenizer(tmp_path: Path, prompt: str, length: int) -> None:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -2.0 - i / 50) for i, piece in enumerate(PIECES)]
    peer = T5TokenizerFast(vocab=vocabulary, extra_ids=3)
    peer.save_pretrained(tmp_path)
    ids, mask = PromptTokenizer(tmp_path / "tokenizer.json").encode(prompt, length)
    expected_ids, expected_mask = peer_encode(peer, prompt, length)
    assert np.array_equal(ids, expected_ids)
    assert np.array_equal(mask, expected_mask)


def test_a_long_prompt_keeps_its_beginning_and_its_end_token(tokenizer_json: Path) -> None:
    tokenizer = PromptTokenizer(tokenizer_json)
    whole, mask = tokenizer.encode("a red circle " * 5, 64)
    short, short_mask = tokenizer.encode("a red circle " * 5, 8)
    assert mask.sum() > 8
    assert short_mask.all()
    assert np.array_equal(short[0, :7], whole[0, :7])
    assert short[0, 7] == 1


def test_the_length_is_512_unless_told(tokenizer_json: Path) -> None:
    ids, mask = PromptTokenizer(tokenizer_json).encode("")
    assert ids.shape == mask.shape == (1, 512)
    assert ids[0, 0] == 1
    assert mask.sum() == 1
    assert not ids[0, 1:].any()


@pytest.mark.parametrize("prompt", ["a red circle", "a red circle " * 300])
def test_the_files_own_truncation_and_padding_do_not_leak(
    tmp_path: Path, tokenizer_json: Path, prompt: str
) -> None:
    stubborn = small_tokenizer(
        tmp_path / "tokenizer.json",
        truncation={
            "direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": 7, "pad_id": 2,
            "pad_type_id": 0, "pad_token": "<unk>",
        },
    )  # fmt: skip
    for length in (8, 512):
        ids, mask = PromptTokenizer(stubborn).encode(prompt, length)
        plain_ids, plain_mask = PromptTokenizer(tokenizer_json).encode(prompt, length)
        assert np.array_equal(ids, plain_ids)
        assert np.array_equal(mask, plain_mask)


def test_broken_tokenizer_files(
    tmp_path: Path, tokenizer_json: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = tokenizer_json.read_bytes()
    contents = {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "not json": b"\x80\x02}q\x00.",
        "other json": b'{"model": 3}',
        "unknown model": good.replace(b'"Unigram"', b'"Trigram"'),
        "bad unk_id": good.replace(b'"unk_id": 2', b'"unk_id": 2000'),
    }
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    contents["a panic"] = tokenizer_of(tmp_path / "x", {"normalizer": charsmap}).read_bytes()
    for name, content in contents.items():
        assert content != good, name
        path = tmp_path / f"{name}.json"
        path.write_bytes(content)
        with pytest.raises(CorruptInputError, match=f"{name}.json is not a tokenizer") as caught:
            PromptTokenizer(path)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    with pytest.raises(CorruptInputError, match=r"cannot read .*: No such file"):
        PromptTokenizer(tmp_path / "missing.json")
    with pytest.raises(CorruptInputError, match=r"cannot read .*: Is a directory"):
        PromptTokenizer(tmp_path)


MODEL: dict[str, Any] = {
    "type": "WordLevel", "vocab": {"<pad>": 0, "</s>": 1, "a": 2}, "unk_token": "a",
}  # fmt: skip
BACKTRACKING = {
    "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False,
}  # fmt: skip
CANNOT_ENCODE: dict[str, tuple[dict[str, Any], str]] = {
    "no unknown word": ({"model": MODEL | {"unk_token": "<unk>"}}, "Missing"),
    "no unknown piece": (
        {"model": {"type": "Unigram", "vocab": [["<pad>", 0.0], ["</s>", 0.0]], "unk_id": None}},
        "unk_id",
    ),
    "pieces of words": (
        {
            "model": {
                "type": "WordPiece", "vocab": {"<pad>": 0, "</s>": 1}, "unk_token": "?",
                "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            }
        },
        "Missing",
    ),
    "a panic": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "non-zero"),
    "backtracking": ({"pre_tokenizer": BACKTRACKING}, "retry-limit"),
}  # fmt: skip


def tokenizer_of(path: Path, changes: dict[str, Any]) -> Path:
    """Write a tokenizer whose words are <pad>, </s> and a, but for some parts of it."""
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    parts = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "decoder": None, "model": MODEL,
        "post_processor": {
            "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [], "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
    }  # fmt: skip
    path.write_text(json.dumps(parts | changes))
    return path


@pytest.mark.parametrize("kind", CANNOT_ENCODE)
@pytest.mark.fault("tokenizer that cannot encode")
def test_a_tokenizer_that_cannot_encode(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    changes, words = CANNOT_ENCODE[kind]
    tokenizer = PromptTokenizer(tokenizer_of(tmp_path / "t.json", changes))
    for encode in (tokenizer.encode, tokenizer.count):
        with pytest.raises(CorruptInputError, match=r"t\.json cannot encode the prompt") as caught:
            encode("a" * 28 + "b c")
        assert words in str(caught.value)
        assert str(caught.value).isprintable()
    assert capfd.readouterr().err == ""


def test_encoding_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tokenizer_of(tmp_path / "t.json", {"pre_tokenizer": BACKTRACKING})
    tokenizer = PromptTokenizer(path)
    monkeypatch.setattr(text_module, "ENCODING_SECONDS", 1e-4)
    with pytest.raises(CorruptInputError, match=r"it did not end within 0\.0001 s"):
        tokenizer.encode("a" * 28 + "b")


def test_a_tokenizer_that_cannot_end_or_pad_is_refused(tmp_path: Path) -> None:
    endless = small_tokenizer(tmp_path / "endless.json", post_processor=False)
    with pytest.raises(CorruptInputError, match=r"endless.json has no post-processor that adds"):
        PromptTokenizer(endless)
    padless = tmp_path / "padless.json"
    padless.write_text(endless.read_text("utf-8").replace("<pad>", "<gap>"), "utf-8")
    with pytest.raises(CorruptInputError, match=r"padless.json has no <pad> token"):
        PromptTokenizer(padless)


@pytest.mark.parametrize(
    "prompt",
    [
        *PROMPTS,
        "  two\n\tlines\u3000and\xa0more  ",
        "âœ” schÃ¶n cafÃ© ï¬�ne",
        "Tom &amp;amp; Jerry &lt;3 &amp;lt;b&amp;gt; &#x1F431; &nbsp;end&nbsp;",
        "&amp;amp;amp;",
        "“quotes” ‘single’ ﬁﬂ Ａｂｃ １２３",
        "&#xD800; &#0; &#x1F;",
        "\x1b[31mred\x1b[0m \ufeffbom",
        "猫".encode().decode("latin-1"),
    ],
)
def test_cleaning_equals_diffusers(prompt: str) -> None:
    assert clean_prompt(prompt) == prompt_clean(prompt)
    check_prompt(clean_prompt(prompt))


def test_cleaning_by_hand() -> None:
    assert clean_prompt(" schÃ¶n \n &amp;amp;  &amp;lt;b&amp;gt;\t") == "schön & <b>"
    assert clean_prompt(" \n ") == ""


@pytest.mark.parametrize("prompt", ["", "-y", "--help", "猫" * 1000, "a\nb", "x" * PROMPT_BYTES])
def test_good_prompts(prompt: str) -> None:
    check_prompt(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a\0b", "NUL character at position 1"),
        (os.fsdecode(b"caf\xe9"), r"not valid UTF-8 at character 3 \(U\+DCE9\)"),
        ("\ud83d", r"not valid UTF-8 at character 0 \(U\+D83D\)"),
        ("x" * (PROMPT_BYTES + 1), "1,048,577 bytes long and at most 1,048,576"),
        ("é" * (PROMPT_BYTES // 2 + 1), "1,048,578 bytes long"),
    ],
)
def test_bad_prompts(prompt: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_prompt(prompt)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_longest_prompt_is_cleaned_and_encoded(tokenizer_json: Path) -> None:
    for prompt in ("x" * PROMPT_BYTES, "a red " * (PROMPT_BYTES // 6)):
        _, mask = PromptTokenizer(tokenizer_json).encode(clean_prompt(prompt))
        assert mask.all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5, None])
def test_zero_pad(dtype: type[np.floating[Any]], tokens: int | None) -> None:
    embedding = np.random.default_rng(0).normal(size=(5, 3)).astype(dtype)
    padded = zero_pad(embedding, 8, tokens=tokens)
    real = 5 if tokens is None else tokens
    assert padded.shape == (8, 3)
    assert padded.dtype == dtype
    assert np.array_equal(padded[:real], embedding[:real])
    assert not padded[real:].any()
    assert zero_pad(embedding).shape == (512, 3)
