"""The hand-built tokenizer, read back by the peers' fast tokenizer."""

import string

import pytest
from data import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, all_scenes
from vocabulary import SPECIALS, build_tokenizer, pieces

from wanx.builtin import prompts

PROMPTS = [
    "a red circle moving right on a blue background",
    "A Red  Circle, twice!",
    "grayish squares moving",
    "",
    "ein Kreis über 中",
]


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build_tokenizer().save(str(path))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def test_special_ids_are_those_of_umt5():
    assert [piece for piece, _ in pieces()[:3]] == list(SPECIALS) == ["<pad>", "</s>", "<unk>"]
    assert len({piece for piece, _ in pieces()}) == len(pieces()) <= 160


@pytest.mark.parametrize("prompt", PROMPTS)
def test_same_ids_as_transformers(peer, prompt):
    assert peer(prompt)["input_ids"] == build_tokenizer().encode(prompt).ids


def test_every_caption_is_nine_words_and_the_end(peer):
    for scene in all_scenes():
        encoding = build_tokenizer().encode(scene.caption)
        assert encoding.tokens == ["▁" + word for word in scene.caption.split()] + ["</s>"]
        assert peer.decode(encoding.ids, skip_special_tokens=True) == scene.caption


def test_ascii_has_no_unknown_characters():
    text = "".join(c for c in string.printable if not c.isspace())
    assert 2 not in build_tokenizer().encode(text).ids
    assert build_tokenizer().encode("é").ids.count(2) == 1


def test_empty_prompt_is_the_end_alone():
    assert build_tokenizer().encode("").ids == [1]


def test_the_package_tells_the_words_of_the_captions():
    told = prompts.SHAPES, prompts.COLOURS, prompts.DIRECTIONS, prompts.BACKGROUNDS
    assert told == tuple(map(tuple, (SHAPES, COLOURS, DIRECTIONS, BACKGROUNDS)))
    assert [prompts.unknown_words(scene.caption) for scene in all_scenes()] == [[]] * 276
