"""The generated clips: reproducible, complete, and what their captions say."""

import itertools

import numpy as np
import pytest
from data import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    FRAMES,
    HELD_OUT,
    SHAPES,
    SIZE,
    Scene,
    all_scenes,
    as_input,
    coverage,
    dataset,
    render,
    split_scenes,
    trajectory,
)

SCENE = Scene("circle", "red", "right", "blue")


def test_caption_is_the_prompt_of_the_readme():
    assert SCENE.caption == "a red circle moving right on a blue background"


def test_split_is_a_partition_of_the_276_combinations():
    train, held_out = split_scenes()
    assert len(train) == 276 - HELD_OUT
    assert len(held_out) == HELD_OUT == 41
    assert set(train) | set(held_out) == set(all_scenes())
    assert not set(train) & set(held_out)


def test_every_word_is_trained_and_every_word_is_held_out_somewhere():
    vocabulary = {
        "shape": set(SHAPES),
        "colour": set(COLOURS),
        "direction": set(DIRECTIONS),
        "background": set(BACKGROUNDS),
    }
    for scenes in split_scenes():
        for field, words in vocabulary.items():
            assert {getattr(scene, field) for scene in scenes} == words


def test_same_seed_same_bytes_and_other_seed_other_clip():
    clip = render(SCENE, 7)
    assert clip.shape == (FRAMES, SIZE, SIZE, 3)
    assert clip.dtype == np.uint8
    assert np.array_equal(clip, render(SCENE, 7))
    assert not np.array_equal(clip, render(SCENE, 8))


def test_known_trajectory():
    # Guards the meaning of a seed: NumPy keeps the streams of its generators stable.
    generator = np.random.default_rng(3)
    radius, centres = trajectory("up", 3)
    assert radius == generator.uniform(9.0, 14.0)
    assert centres[0][1] > centres[-1][1]
    assert len({x for x, _ in centres}) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_area_of_a_shape(shape):
    area = {"circle": np.pi, "square": 1.8**2, "triangle": 2.0}[shape]
    covered = coverage(shape, [(31.3, 30.8)], 12.0)[0].sum()
    assert covered == pytest.approx(area * 144, rel=0.01)


@pytest.mark.parametrize(("shape", "direction"), list(itertools.product(SHAPES, DIRECTIONS)))
def test_object_stays_inside_and_moves_as_told(shape, direction):
    scene = Scene(shape, "green", direction, "black")
    for seed in range(8):
        clip = render(scene, seed).astype(int)
        paper = np.array(BACKGROUNDS["black"])
        edges = [clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]]
        assert all((edge == paper).all() for edge in edges)
        inked = np.abs(clip - paper).sum(-1)
        centres = [
            np.array([np.average(np.arange(SIZE), weights=frame.sum(axis)) for axis in (0, 1)])
            for frame in inked
        ]
        moved = centres[-1] - centres[0]
        wanted = np.array(DIRECTIONS[direction])
        assert moved @ wanted > 10
        assert abs(moved @ wanted[::-1]) < 0.5


def test_dataset_shows_every_scene_equally_often_with_seeds_of_its_own():
    scenes, _ = split_scenes()
    pairs = dataset(scenes, 3 * len(scenes), seed=1)
    assert all(sum(pair[0] == scene for pair in pairs) == 3 for scene in scenes[:5])
    assert len({seed for _, seed in pairs}) == len(pairs)
    assert not {seed for _, seed in pairs} & {seed for _, seed in dataset(scenes, 500, seed=2)}


def test_input_range_and_layout():
    clip = np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8)
    clip[3, 5, 9] = (255, 0, 51)
    video = as_input(clip)
    assert video.shape == (3, FRAMES, SIZE, SIZE)
    assert video.dtype == np.float32
    np.testing.assert_allclose(video[:, 3, 5, 9], [1.0, -1.0, -0.6], atol=1e-6)
