"""``wanx bench``: real trials of the built-in model, and what is left when they are disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_cli import start

from tests.support.command_line import Wanx
from tests.support.speed_results import results, trial
from wanx.benchmarks.report.files import dumps
from wanx.benchmarks.speed.results import Results, read_results
from wanx.builtin import builtin_bundle

SMALL = ["--sizes", "32x48", "--frames", "5", "--steps", "3", "--no-roofline"]


def report_of(folder: Path) -> Results:
    return read_results(folder / "report" / "report.json")


def test_bench_measures_every_part_of_a_run(wanx: Wanx, tmp_path: Path) -> None:
    result = wanx("bench", "tiny", *SMALL, "--repeat", "2")
    assert result.code == 0
    for name in ("end to end", "cold start", "model load", "text encode", "step", "decode"):
        assert name in result.out
    found = report_of(tmp_path)
    assert found.complete
    assert found.command == f"wanx bench tiny {' '.join(SMALL)} --repeat 2"
    (case,) = found.cases
    assert (case.width, case.height, case.frames, case.steps, case.tokens) == (32, 48, 5, 3, 12)
    assert [(t.subject, t.case, t.round) for t in found.trials] == [(0, 0, 0), (0, 0, 1)]
    for made in found.trials:
        assert [stage.name for stage in made.stages] == ["text", "denoise", "decode", "write"]
        assert [len(stage.calls) for stage in made.stages[:3]] == [2, 3, 2]
        parts = sum(stage.load_seconds + stage.seconds for stage in made.stages)
        # What is left: opening the bundle to the first stage, and checking the frames.
        rest = made.end_to_end_seconds - made.cold_start_seconds - parts
        assert 0 < rest < 0.5 * made.end_to_end_seconds
        assert 0.05 < made.cold_start_seconds < made.end_to_end_seconds
        assert max(made.memory.host_bytes) > 20e6
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<img") == 3
    assert "| step |" in (tmp_path / "report" / "report.md").read_text()
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "report.html", "report.json", "report.md",
    ]  # fmt: skip


def test_bundles_take_turns_and_the_order_turns_round(wanx: Wanx, tmp_path: Path) -> None:
    shutil.copytree(builtin_bundle(), tmp_path / "new")
    result = wanx(
        "bench", "tiny", "new", *SMALL, "--frames", "1", "--repeat", "2", "--baseline", "new",
        "--json",
    )  # fmt: skip
    assert result.code == 0
    document = json.loads(result.out)
    assert [t["subject"] for t in document["trials"]] == [0, 1, 1, 0]
    assert document["settings"]["baseline"] == 1
    assert [s["label"] for s in document["subjects"]] == ["tiny", "new"]
    assert "times new" in (tmp_path / "report" / "report.md").read_text()


def test_a_profile_says_where_the_time_goes(wanx: Wanx, tmp_path: Path) -> None:
    result = wanx("bench", *SMALL[:-1], "--repeat", "1", "--profile")
    assert result.code == 0
    found = {item.component: item for item in report_of(tmp_path).rooflines}
    assert found.keys() == {"text_encoder", "dit", "vae_decoder_up_rest"}
    for item in found.values():
        assert sum(part.seconds or 0 for part in item.parts) == pytest.approx(item.seconds)
        # Ceilings are measured at another time, so on a busy machine they may be the slower ones.
        assert item.least_seconds > 0
        assert item.seconds > 0
        assert len(item.operations) == 10
        assert item.sentence in result.out
    (denoised,) = [s for s in report_of(tmp_path).trials[0].stages if s.name == "denoise"]
    assert min(denoised.calls[1:]) <= found["dit"].seconds <= max(denoised.calls[1:])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "How close to the limit" in page
    assert "The most expensive operations" in page


def test_another_provider_has_no_profile_of_the_processors_own(wanx: Wanx, tmp_path: Path) -> None:
    small = [*SMALL[:-1], "--repeat", "1", "--profile"]
    shutil.copytree(builtin_bundle(), tmp_path / "built")
    assert wanx("build", "built", "--target", "openvino").code == 0
    for arguments in (["tiny", "--provider", "openvino"], ["built"]):
        result = wanx("bench", *arguments, *small)
        assert result.code == 0
        rooflines = report_of(tmp_path).rooflines
        assert {item.component for item in rooflines} == {
            "text_encoder", "dit", "vae_decoder_up_rest",
        }  # fmt: skip
        for item in rooflines:
            assert item.seconds > 0
            assert item.operations == ()
            assert {part.seconds for part in item.parts} == {None}
    assert report_of(tmp_path).settings.provider == "auto"


def test_a_peer_takes_part(wanx: Wanx, tmp_path: Path) -> None:
    result = wanx("bench", "tiny", *SMALL, "--repeat", "1", "--peer", "diffusers")
    assert result.code == 0
    (agreement,) = report_of(tmp_path).agreements
    assert agreement.first_step_cosine > 0.999999
    assert agreement.latent_cosine > 0.99999
    assert "Do they make the same video?" in (tmp_path / "report" / "report.html").read_text()


def test_a_sweep_is_in_the_report(wanx: Wanx, tmp_path: Path) -> None:
    result = wanx("bench", *SMALL, "--frames", "17", "--repeat", "1", "--sweep", "tokens")
    assert result.code == 0
    (found,) = report_of(tmp_path).sweep
    assert [point.tokens for point in found.points] == [12, 18, 24, 30]
    assert [p.tokens for p in found.predictions] == [32_760, 75_600]
    assert "a·L + b·L²" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--repeat", "0"], "--repeat is 0; choose 1 to 1000"),
        (["--warm-up", "3"], "--warm-up 3 leaves none of 3 steps to measure; give 0 to 2"),
        (["--baseline", "other"], "--baseline other is not measured here; choose tiny"),
        (["--peer", "comfy"], "--peer comfy is not available; choose diffusers or"),
        (["--sweep", "steps"], "--sweep steps is not available; choose tokens"),
        (["--fail-over", "10%"], "--fail-over goes with --compare"),
        (["--sizes", "32x47"], "47"),
        (["nothing"], "nothing"),
    ],
)
def test_bad_options(wanx: Wanx, tmp_path: Path, arguments: list[str], text: str) -> None:
    result = wanx("bench", *([] if arguments == ["nothing"] else ["tiny"]), *SMALL, *arguments)
    assert result.code == 2
    assert text in result.error
    assert not (tmp_path / "report" / "report.json").exists()


def test_bundles_of_different_tasks(wanx: Wanx, tmp_path: Path) -> None:
    result = wanx("bench", "tiny", "tiny-i2v", *SMALL)
    assert result.code == 2
    assert "tiny is t2v, tiny_i2v is i2v" in result.error


def test_a_folder_that_cannot_be(wanx: Wanx, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    result = wanx("bench", "tiny", *SMALL)
    assert result.code == 2
    assert "report cannot be one" in result.error


def wait_for_trials(folder: Path, count: int, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    path = folder / "report" / "report.json"
    while not path.exists() or len(report_of(folder).trials) < count:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)


def workers_of(pid: int) -> list[int]:
    found = []
    children = ""
    ended = FileNotFoundError, ProcessLookupError
    with suppress(*ended):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    for child in children.split():
        with suppress(*ended):
            if b"speed.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_what_was_measured_survives(tmp_path: Path, sent: signal.Signals) -> None:
    bench = start("bench", "tiny", *SMALL, "--repeat", "50", cwd=tmp_path)
    wait_for_trials(tmp_path, 2, bench)
    workers = workers_of(bench.pid)
    bench.send_signal(sent)
    _, error = bench.communicate(timeout=300)
    found = report_of(tmp_path)
    assert len(found.trials) >= 2
    assert not found.complete
    assert b"Traceback" not in error
    if sent == signal.SIGKILL:
        assert bench.returncode == -signal.SIGKILL
        return
    assert bench.returncode == 130
    assert b"marked incomplete" in error
    assert f"interrupted after {len(found.trials)} trials" in found.problems[0]
    assert "Incomplete" in (tmp_path / "report" / "report.html").read_text()
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_trial_that_is_killed_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    shutil.copytree(builtin_bundle(), tmp_path / "new")
    bench = start("bench", "tiny", "new", *SMALL, "--repeat", "2", cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not (workers := workers_of(bench.pid)):
        assert time.monotonic() < deadline
        assert bench.poll() is None
        time.sleep(0.01)
    os.kill(workers[0], signal.SIGKILL)
    _, error = bench.communicate(timeout=300)
    assert bench.returncode == 1
    (problem,) = report_of(tmp_path).problems
    assert problem.startswith("tiny, 32x48, 5 frames: it ended with SIGKILL")
    assert problem in error.decode()
    assert [t.subject for t in report_of(tmp_path).trials] == [1, 1]


def test_compare_exits_3_past_the_limit(wanx: Wanx, tmp_path: Path) -> None:
    for name, seconds in (("old", 1.0), ("new", 1.3)):
        rounds = [trial(0, n, [1, seconds + n / 100, seconds + n / 100]) for n in range(3)]
        (tmp_path / f"{name}.json").write_text(dumps(results(*rounds).to_json()))
    same = wanx("bench", "--compare", "old.json", "old.json", "--fail-over", "0%")
    assert same.code == 0
    assert "slower" not in same.out
    assert wanx("bench", "--compare", "old.json", "new.json").code == 0
    worse = wanx("bench", "--compare", "old.json", "new.json", "--fail-over", "10%")
    assert worse.code == 3
    assert "slower" in worse.out
    assert "step of one at 64x48, 5 frames is slower by 29.7%, more than 10%" in worse.error
    assert wanx("bench", "--compare", "new.json", "old.json", "--fail-over", "10%").code == 0
    found = json.loads(wanx("bench", "--compare", "old.json", "new.json", "--json").out)
    assert next(c for c in found["changes"] if c["metric"] == "step")["beyond_noise"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["old.json"], 2, "takes an old and a new report.json, not 1 files"),
        (["old.json", "none.json"], 2, "none.json cannot be read"),
        (["old.json", "old.json", "--fail-over", "10"], 2, "--fail-over 10 is not a percentage"),
        (["old.json", "bad.json"], 5, "bad.json is not JSON"),
    ],
)
def test_bad_comparisons(
    wanx: Wanx, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    (tmp_path / "old.json").write_text(dumps(results(trial(0, 0, [1, 1])).to_json()))
    (tmp_path / "bad.json").write_text("{")
    result = wanx("bench", "--compare", *arguments)
    assert result.code == code
    assert text in result.error
