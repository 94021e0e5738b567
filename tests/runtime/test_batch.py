"""Many runs of one bundle: seeds, lines of a file, what fails alone and what is skipped."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wanx
from wanx.errors import CancelledError, UsageError, WanxError
from wanx.runtime.batch import Job, read_jobs, run_jobs, seeds
from wanx.runtime.options import RunOptions
from wanx.runtime.output.claims import claimed
from wanx.runtime.output.provenance import read_metadata
from wanx.runtime.pipeline import Pipeline

DEFAULTS = RunOptions(steps=1, frames=1, seed=0)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return wanx.load(threads=1)


def jobs_of(tmp_path: Path, *lines: object, defaults: RunOptions = DEFAULTS) -> list[Job]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return read_jobs(path, tmp_path / "out", defaults, ".png")


def test_a_line_sets_options_and_leaves_the_rest(tmp_path: Path) -> None:
    first, second = jobs_of(
        tmp_path,
        {"prompt": "a", "size": "80x48", "guide_scale": 1, "seed": 5, "output": "x.png"},
        "",
        {"prompt": "b", "image": "cat.png", "references": ["r.png"]},
    )
    assert first.options == RunOptions(
        prompt="a", width=80, height=48, guide_scale=1, seed=5, steps=1, frames=1
    )
    assert first.output == tmp_path / "out" / "x.png"
    assert isinstance(second.options, RunOptions)
    assert (second.name, second.output.name) == ("line 3", "00003.png")
    assert second.options.image == tmp_path / "cat.png"
    assert second.options.references == (tmp_path / "r.png",)
    assert (second.options.steps, second.options.seed) == (1, 0)


def test_null_leaves_an_option_and_a_whole_number_may_be_a_float(tmp_path: Path) -> None:
    nulls = dict.fromkeys(("prompt", "steps", "seed", "size", "image", "references", "solver"))
    (job,) = jobs_of(tmp_path, nulls | {"frames": 5.0}, defaults=RunOptions(prompt="a", steps=3))
    assert job.options == RunOptions(prompt="a", steps=3, frames=5)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "prompts.jsonl"),
        ("[1]", "instead of an object"),
        ('{"seed": 1, "seed": 2}', "twice"),
        ({"promt": "a"}, "'promt' is not an option; choose from output, size, "),
        ({"seed": "7"}, "seed is '7'; give a whole number"),
        ({"steps": True}, "steps is True"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"guide_scale": "high"}, "give a number"),
        ({"prompt": 3}, "prompt is 3; give a text"),
        ({"image": ["x.png"]}, "name of a file"),
        ({"size": "big"}, "WIDTHxHEIGHT"),
        ({"references": "r.png"}, "a list"),
        ({"references": [1]}, "names of files"),
        ({"output": "../x.png"}, "without folders"),
        ({"output": "/etc/x.png"}, "without folders"),
        ({"output": ".x.png"}, "without folders"),
        ({"output": 3}, "name of a file"),
        ({"output": ""}, "name of a file"),
        ({"output": ".."}, "name of a file"),
        ({"output": "a" * 252 + ".png"}, "at most 255 bytes"),
        ({"output": "猫" * 84 + ".png"}, "256 bytes long"),
        ({"output": "\ud800.png"}, "printable characters"),
        ({"output": "a\0.png"}, "printable characters"),
        ({"output": "\x1b[31mred.png"}, "printable characters"),
        ({"output": "a\u2028b.png"}, "printable characters"),
        ({"output": "a\x85b.png"}, "printable characters"),
        ({"\x1b[31m": 1}, r"'\x1b[31m' is not an option"),
        ({"output": "x.png"}, "already that of line 1"),
    ],
)
def test_a_bad_line_is_a_job_that_fails(tmp_path: Path, line: object, words: str) -> None:
    good, bad = jobs_of(tmp_path, {"prompt": "a", "output": "x.png"}, line)
    assert isinstance(good.options, RunOptions)
    assert isinstance(bad.options, WanxError)
    assert words in str(bad.options), str(bad.options)


@pytest.mark.parametrize(
    "name", ["猫\u3000犬.png", "👩\u200d🚀.png", "a b\xa0c.png", "a" * 251 + ".png"]
)
def test_names_of_outputs_in_any_language(tmp_path: Path, name: str) -> None:
    (job,) = jobs_of(tmp_path, {"prompt": "a", "output": name})
    assert isinstance(job.options, RunOptions)
    assert job.output.name == name


def test_files_that_are_no_batch(tmp_path: Path) -> None:
    for data, words in (
        (b"", "no lines"),
        (b"\n \n", "no lines"),
        (b'{"prompt": "\xff"}', "UTF-8"),
    ):
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(data)
        with pytest.raises(UsageError, match=words):
            read_jobs(path, tmp_path, DEFAULTS, ".png")
    for path in (tmp_path / "nothing.jsonl", tmp_path):
        with pytest.raises(UsageError, match="not there or not a file"):
            read_jobs(path, tmp_path, DEFAULTS, ".png")


@pytest.mark.fault("line that cannot be run")
def test_one_failure_does_not_stop_the_others(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    jobs = jobs_of(
        tmp_path,
        {"prompt": "a red circle"},
        {"prompt": "a red circle", "steps": 0},
        {"promt": "a red circle"},
        {"prompt": "a red circle", "seed": 4},
    )
    started: list[int] = []
    outcomes = list(
        run_jobs(pipeline, jobs, lambda number, job: started.append(number), resume=True)
    )
    assert started == [0, 1, 2, 3]
    assert ["1 to 1000" in str(o.error) for o in outcomes] == [False, True, False, False]
    assert [o.error is None for o in outcomes] == [True, False, False, True]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["00001.png", "00004.png"]
    assert read_metadata(tmp_path / "out" / "00004.png")["seed"] == "4"


# Lines whose fault shows only when they are run, or that the file system refuses.
HOSTILE_LINES: list[dict[str, object]] = [
    {"output": "a" * 300 + ".png"},
    {"output": "\ud800.png"},
    {"output": "folder.png"},
    {"output": ""},
    {"output": "a.txt"},
    {"prompt": "\ud800"},
    {"prompt": "a\0b"},
    {"negative_prompt": "\udfff"},
    {"solver": "\ud800"},
    {"image": "\ud800.png"},
    {"video": "a\0.mp4"},
    {"references": ["x" * 5000]},
    {"seed": 10**19},
    {"steps": -(10**18)},
    {"size": "9" * 18 + "x1"},
    {"guide_scale": -1e-320, "steps": 10**9},
]


@pytest.mark.parametrize("line", HOSTILE_LINES, ids=lambda line: ascii(line)[:30])
@pytest.mark.fault("line that cannot be run")
def test_no_line_can_end_the_batch(
    pipeline: Pipeline, tmp_path: Path, line: dict[str, object]
) -> None:
    (tmp_path / "out" / "folder.png").mkdir(parents=True)
    jobs = jobs_of(tmp_path, {"prompt": "a"} | line, {"prompt": "a", "output": "good.png"})
    bad, good = run_jobs(pipeline, jobs, lambda number, job: None, resume=True)
    assert bad.error is not None
    assert "unexpected" not in str(bad.error)
    assert "\n" not in str(bad.error)
    assert good.result is not None
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["folder.png", "good.png"]


def test_a_fault_of_ours_costs_one_line(tmp_path: Path) -> None:
    class Faulty:
        def run(self, options: RunOptions, **_: object) -> None:
            raise (MemoryError("of\ntwo lines") if options.seed == 1 else KeyError("x"))

    jobs = seeds(RunOptions(seed=1), [tmp_path / "a.png", tmp_path / "b.png"])
    first, second = run_jobs(Faulty(), jobs, lambda number, job: None, resume=False)  # type: ignore[arg-type]
    assert "unexpected MemoryError: of two lines; please report it" in str(first.error)
    assert "unexpected KeyError: 'x'" in str(second.error)


def test_a_second_time_only_what_is_missing_is_made(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    jobs = jobs_of(tmp_path, {"prompt": "a"}, {"prompt": "b"})
    (folder / "00001.png").write_bytes(b"finished")
    first, second = run_jobs(pipeline, jobs, lambda number, job: None, resume=True)
    assert (first.result, first.error) == (None, None)
    assert second.result is not None
    assert (folder / "00001.png").read_bytes() == b"finished"


def test_what_another_worker_is_making_is_looked_at_again_at_the_end(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    jobs = jobs_of(tmp_path, *({"prompt": "a", "seed": seed} for seed in range(4)))
    started: list[int] = []
    with ExitStack() as finished, ExitStack() as died, claimed(jobs[2].output):
        finished.enter_context(claimed(jobs[0].output))
        died.enter_context(claimed(jobs[1].output))

        def on_start(number: int, job: Job) -> None:
            started.append(number)
            if number == 3:
                jobs[0].output.write_bytes(b"by the other")
                finished.close()
                died.close()

        outcomes = list(run_jobs(pipeline, jobs, on_start, resume=True))
    assert started == [3, 1]
    assert [(o.job.name, o.result is not None, o.claimed) for o in outcomes] == [
        ("line 4", True, False),
        ("line 1", False, False),
        ("line 2", True, False),
        ("line 3", False, True),
    ]
    assert jobs[0].output.read_bytes() == b"by the other"
    assert sorted(p.name for p in folder.iterdir()) == [f"0000{i}.png" for i in (1, 2, 4)]


def test_seeds_follow_each_other(pipeline: Pipeline, tmp_path: Path) -> None:
    options = RunOptions(prompt="a red circle", steps=1, frames=1, seed=8)
    jobs = seeds(options, [tmp_path / "a.png", tmp_path / "b.png"])
    assert [job.name for job in jobs] == ["1 of 2", "2 of 2"]
    for _ in range(2):
        outcomes = list(run_jobs(pipeline, jobs, lambda number, job: None, resume=False))
        assert all(outcome.result for outcome in outcomes)
    for number, job in enumerate(jobs):
        frames = pipeline("a red circle", steps=1, frames=1, seed=8 + number).frames
        assert frames is not None
        assert np.array_equal(np.asarray(Image.open(job.output)), frames[0])


def test_a_drawn_seed_is_the_first_of_a_row(tmp_path: Path) -> None:
    outputs = [tmp_path / f"{i}.png" for i in range(3)]
    jobs = seeds(RunOptions(), outputs)
    numbers = [job.options.seed for job in jobs if isinstance(job.options, RunOptions)]
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert seeds(RunOptions(), outputs) != jobs


def test_cancelling_ends_the_whole_batch(pipeline: Pipeline, tmp_path: Path) -> None:
    jobs = seeds(DEFAULTS, [tmp_path / "a.png", tmp_path / "b.png"])
    started: list[int] = []
    with pytest.raises(CancelledError):
        list(
            run_jobs(
                pipeline, jobs, lambda number, job: started.append(number),
                resume=False, cancelled=lambda: True,
            )
        )  # fmt: skip
    assert started == [0]
    assert list(tmp_path.iterdir()) == []
