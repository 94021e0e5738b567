"""The command line: what a person types, what they see, what is left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command_line import Wanx
from wanx.builtin import builtin_bundle
from wanx.runtime.output.provenance import read_metadata

SMALL = ["--steps", "2", "--frames", "5", "--size", "64x64", "--seed", "3", "--threads", "1"]
PROMPT = "a red circle moving right on a blue background"


def start(*arguments: object, cwd: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "wanx", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_run_writes_a_video_that_says_how_it_was_made(wanx: Wanx, tmp_path: Path) -> None:
    result = wanx("run", "tiny", PROMPT, "-o", "v.mp4", *SMALL)
    assert result.code == 0
    assert "wrote" in result.out
    assert "seed 3" in result.out
    facts = read_metadata(tmp_path / "v.mp4")
    assert facts["prompt"] == PROMPT
    assert facts["seed"] == "3"
    assert len(facts["bundle"]) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_bare_run_uses_the_builtin_model_and_never_overwrites(wanx: Wanx, tmp_path: Path) -> None:
    for name in ("out.mp4", "out-1.mp4"):
        result = wanx("run", *SMALL)
        assert result.code == 0, result.err
        assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("options", "videos"),
    [((), 3), (("--frames", "1"), 3), (("--count", "2", "--frames", "1"), 6)],
    ids=["video", "image", "count"],
)
@pytest.mark.fault("two runs with one name")
def test_runs_beside_each_other_take_names_of_their_own(
    tmp_path: Path, options: tuple[str, ...], videos: int
) -> None:
    arguments = ("run", "tiny", PROMPT, "--json", "-q", *SMALL, *options)
    processes = [start(*arguments, "--seed", seed, cwd=tmp_path) for seed in (10, 20, 30)]
    outputs: dict[str, str] = {}
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
        facts = json.loads(out)
        for fact in facts if isinstance(facts, list) else [facts]:
            outputs[fact["output"]] = str(fact["options"]["seed"])
    assert len(outputs) == videos
    assert sorted(outputs) == sorted(str(path) for path in tmp_path.iterdir())
    for path, seed in outputs.items():
        assert read_metadata(Path(path))["seed"] == seed


def test_many_images_hold_no_more_files_than_one(wanx: Wanx, tmp_path: Path) -> None:
    (tmp_path / "out-2.png").write_text("mine")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, limits[1]))
    try:
        result = wanx("run", "tiny", PROMPT, "--count", "60", "-q", *ONE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert result.code == 0, result.err
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"out-{number}.png" for number in range(1, 62)}
    assert (tmp_path / "out-2.png").read_text() == "mine"


@pytest.mark.fault("two runs with one name")
def test_two_workers_on_one_file_of_prompts_make_no_line_twice(tmp_path: Path) -> None:
    lines = [{"prompt": PROMPT, "seed": seed} for seed in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("run", "--prompts", "p.jsonl", "-o", "many", "--json", "-q", *ONE)
    results = []
    for process in [start(*arguments, cwd=tmp_path) for _ in range(2)]:
        out, err = process.communicate()
        assert process.returncode == 0, err
        results.append({fact["name"]: fact for fact in json.loads(out)})
    for number in range(1, 7):
        made = [result[f"line {number}"] for result in results]
        assert sum("stages" in fact for fact in made) == 1
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert names == [f"{number:05d}.png" for number in range(1, 7)]


def test_one_argument_is_a_bundle_or_a_prompt(wanx: Wanx, tmp_path: Path) -> None:
    assert wanx("run", PROMPT, "-o", "p.gif", *SMALL).code == 0
    assert read_metadata(tmp_path / "p.gif")["prompt"] == PROMPT
    assert wanx("run", builtin_bundle(), "-o", "b.gif", *SMALL).code == 0
    typo = wanx("run", "my-bundel", *SMALL)
    assert typo.code == 2
    assert "'my-bundel' is neither a bundle nor a prompt" in typo.error


def test_run_json_lists_every_option_and_stage(wanx: Wanx) -> None:
    result = wanx("run", "tiny", PROMPT, "--json", "-q", "-o", "v.webm", *SMALL)
    facts = json.loads(result.out)
    assert facts["output"].endswith("v.webm")
    assert facts["options"]["steps"] == 2
    assert facts["options"]["seed"] == 3
    assert [stage["name"] for stage in facts["stages"]] == ["text", "denoise", "decode", "write"]
    assert result.err == ""


def test_progress_without_a_terminal_is_a_line_per_stage(wanx: Wanx) -> None:
    result = wanx("run", "tiny", PROMPT, "--json", "-o", "v.webm", *SMALL)
    stages = [line.partition(":")[0] for line in result.err.splitlines()]
    assert stages == ["encode text", "denoise", "decode"]
    assert "denoise: 0 of 2\n" in result.err
    assert json.loads(result.out)["options"]["seed"] == 3


def test_options_come_from_the_environment(wanx: Wanx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANX_RUN_STEPS", "1")
    monkeypatch.setenv("WANX_RUN_FRAMES", "1")
    facts = json.loads(wanx("run", "tiny", PROMPT, "--json", "-o", "v.png", "--threads", "1").out)
    assert facts["options"]["steps"] == 1
    assert facts["options"]["frames"] == 1


def test_a_seed_repeats_and_minus_one_draws(wanx: Wanx, tmp_path: Path) -> None:
    few = ["--steps", "1", "--frames", "1", "--threads", "1", "--json"]
    for name in ("a.png", "b.png"):
        assert wanx("run", "tiny", PROMPT, "-o", name, "--seed", "7", *few).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    drawn = {
        json.loads(wanx("run", "tiny", PROMPT, "-o", "c.png", "--seed", "-1", *few).out)["options"][
            "seed"
        ]
        for _ in range(2)
    }
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "65x64"], "64 or 80"),
        (["--size", "wide"], "WIDTHxHEIGHT"),
        (["--frames", "16"], "13 or 17"),
        (["--frames", "0"], "1"),
        (["--steps", "0"], "1 to 1000"),
        (["--shift", "-1"], "positive"),
        (["--shift", "nan"], "positive"),
        (["--guide-scale", "inf"], "finite"),
        (["--solver", "heun"], "unipc"),
        (["--seed", "-2"], "seed"),
        (["--fps", "0"], "fps"),
        (["--vram-budget", "12"], "12G"),
        (["--vram-budget", "12G"], "runs on the processor"),
        (["-o", "video.avi"], ".mp4"),
        (["-o", "no/such/folder.mp4"], "does not exist"),
        (["-o", "http://host/v.mp4"], "URL"),
        (["-o", "concat:v.mp4"], "URL"),
        (["-o", "v.png"], "one frame"),
    ],
)
@pytest.mark.fault("output named like an option or a URL", "bad size, frames or steps")
def test_bad_options_are_one_line_and_leave_nothing(
    wanx: Wanx, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = wanx("run", "tiny", PROMPT, *arguments)
    assert result.code == 2
    assert words in result.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompt", ["", "-leading dash", "—", "a" * 100_000, "<script>&amp;"])
@pytest.mark.fault("odd prompt")
def test_odd_prompts_run(wanx: Wanx, tmp_path: Path, prompt: str) -> None:
    few = ["--steps", "1", "--frames", "1", "--threads", "1", "-o", "v.png"]
    assert wanx("run", *few, "--", "tiny", prompt).code == 0
    assert read_metadata(tmp_path / "v.png")["prompt"] == prompt


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("a\0b", "NUL"), ("x" * (2**20 + 1), "1,048,577 bytes"), ("\udcff", "UTF-8")],
)
@pytest.mark.fault("odd prompt")
def test_impossible_prompts_are_refused(wanx: Wanx, prompt: str, words: str) -> None:
    result = wanx("run", "tiny", prompt, *SMALL)
    assert result.code == 2
    assert words in result.error


@pytest.mark.fault("output named like an option or a URL")
def test_an_output_that_looks_like_an_option_is_a_file(wanx: Wanx, tmp_path: Path) -> None:
    few = ["--steps", "1", "--frames", "1", "--threads", "1"]
    assert wanx("run", "tiny", PROMPT, "--output=-y.png", *few).code == 0
    assert (tmp_path / "-y.png").exists()


ONE = ["--steps", "1", "--frames", "1", "--threads", "1"]


def test_several_images_of_one_prompt(wanx: Wanx, tmp_path: Path) -> None:
    result = wanx("run", "tiny", PROMPT, "--count", "2", "--seed", "5", *ONE)
    assert result.code == 0, result.err
    assert "2 written, 0 skipped, 0 failed" in result.out
    seeds = [read_metadata(tmp_path / f"out-{i}.png")["seed"] for i in (1, 2)]
    assert seeds == ["5", "6"]
    assert wanx("run", "tiny", PROMPT, "--count", "2", *ONE).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"out-{i}.png" for i in (1, 2, 3, 4)}
    assert read_metadata(tmp_path / "out-1.png")["seed"] == "5"
    assert (
        wanx("run", "tiny", PROMPT, "-o", "out.png", "--count", "2", "--seed", "9", *ONE).code == 0
    )
    assert read_metadata(tmp_path / "out-1.png")["seed"] == "9"


def test_a_file_of_prompts(wanx: Wanx, tmp_path: Path) -> None:
    lines = [{"prompt": PROMPT, "output": "a.png"}, {"promt": "typo"}, {"prompt": "a", "seed": 1}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first = wanx("run", "--prompts", "p.jsonl", "-o", "many", *ONE)
    assert first.code == 1
    assert "2 written, 0 skipped, 1 failed" in first.out
    assert "line 2: 'promt' is not an option" in first.out
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["00003.png", "a.png"]
    again = wanx("run", "--prompts", "p.jsonl", "-o", "many", "--json", *ONE)
    assert again.code == 1
    facts = json.loads(again.out)
    assert [("error" in fact, "stages" in fact) for fact in facts] == [
        (False, False),
        (True, False),
        (False, False),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "x.png"], "takes no --image"),
        (["--video", "x.mp4"], "takes no --video"),
        (["--prompts", "nothing.jsonl"], "not there"),
        (["--prompts", "nothing.jsonl", "--count", "2"], "do not go together"),
        (["--prompts", "nothing.jsonl", "-o", "a/b/c"], "needs a folder"),
    ],
)
def test_bad_inputs_are_one_line(wanx: Wanx, arguments: list[str], words: str) -> None:
    result = wanx("run", "tiny", PROMPT, *arguments)
    assert result.code == 2
    assert words in result.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--count", "0"], "'--count': Input should be greater than or equal to 1 (found"),
        (["run", "--steps", "many"], "(found 'many'); see wanx run --help"),
        (["run", "--steps", "two\nlines\x1b[31m"], r"(found 'two\nlines\x1b[31m')"),
        (["run", "--guide-scale", "5,0"], "guide scale is '5,0'; give a number such as 5"),
        (["verify", "tiny", "--threads", "-3"], "(found '-3')"),
        (["build", "tiny", "--frames", "0"], "(found '0')"),
        (["run", "--step", "3"], "no such option: --step"),
        (["run", "--a\nb\x1b[31m"], r"no such option: --a"),
        (["run", "--steps"], "'--steps' requires an argument"),
        (["run", "--json=1"], "'--json' does not take a value"),
        (["inspect"], "missing argument 'BUNDLE'; see wanx inspect --help"),
        (["inspect", "tiny", "静态", "c"], "(静态 c); see wanx inspect --help"),
        (["runn"], "no such command 'runn'"),
        (["--bogus"], "no such option: --bogus; see wanx --help"),
    ],
)
def test_errors_of_the_parser_are_one_line(
    wanx: Wanx, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = wanx(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.error.startswith("error: ")
    assert words in result.error
    assert result.error.isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_bad_value_in_the_environment_is_one_line(
    wanx: Wanx, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANX_RUN_STEPS", "many")
    result = wanx("run", "tiny", PROMPT)
    assert result.code == 2
    assert result.error.startswith("error: invalid value for '--steps'")
    assert "(found 'many')" in result.error


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "tiny", PROMPT, *SMALL],
        ["run", "--prompts", "p.jsonl"],
        ["run", "tiny-i2v", PROMPT, "--image", "x.png"],
        ["compare", "a", "b"],
        ["bench", "tiny"],
        ["inspect", "b"],
        ["verify", "b"],
    ],
)
def test_a_working_folder_that_is_gone_is_one_line(
    wanx: Wanx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = wanx(*arguments)
    assert result.code in (1, 2)
    assert result.error.startswith("error: ")
    assert wanx("doctor").code == 0


def test_no_command_shows_the_help(wanx: Wanx) -> None:
    result = wanx()
    assert result.code == 2
    assert "Usage: wanx" in result.out + result.err


def test_inspect_verify_doctor(wanx: Wanx) -> None:
    assert "vae_decoder_up_rest" in wanx("inspect", "tiny").out
    facts = json.loads(wanx("inspect", "tiny", "--json").out)
    assert facts["config"]["task"] == "t2v"
    assert facts["size_bytes"] <= 15_000_000
    assert "files are as the manifest says" in wanx("verify", "tiny").out
    findings = json.loads(wanx("doctor", "--json").out)
    assert all(finding["ok"] for finding in findings if finding["required"])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Copy the built-in bundle to where a test may damage it."""
    return Path(shutil.copytree(builtin_bundle(), tmp_path / "bundle"))


@pytest.mark.fault("flipped bit")
def test_a_flipped_bit_is_found_and_named(wanx: Wanx, bundle: Path) -> None:
    path = bundle / "weights" / "dit.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    report = wanx("verify", bundle)
    assert report.code == 5
    assert "weights/dit.safetensors" in report.out
    run = wanx("run", bundle, PROMPT, *SMALL)
    assert run.code == 5
    assert "weights/dit.safetensors" in run.error


@pytest.mark.fault("missing file")
def test_a_missing_graph_is_named(wanx: Wanx, bundle: Path) -> None:
    (bundle / "graphs" / "dit.onnx").unlink()
    run = wanx("run", bundle, PROMPT, *SMALL)
    assert run.code == 5
    assert "graphs/dit.onnx" in run.error


@pytest.mark.fault("manifest of a newer wanx")
def test_a_newer_bundle_asks_for_an_upgrade(wanx: Wanx, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    result = wanx("inspect", bundle)
    assert result.code == 4
    assert "upgrade wanx" in result.error


@pytest.mark.fault("read-only bundle")
def test_a_read_only_bundle_runs(wanx: Wanx, bundle: Path) -> None:
    paths = [bundle, *bundle.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted((path, path.stat().st_mtime_ns) for path in paths)
    try:
        assert wanx("run", bundle, PROMPT, "-o", "v.gif", *SMALL).code == 0
        assert sorted((path, path.stat().st_mtime_ns) for path in paths) == before
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


STOPPED = [
    (signal.SIGINT, 130),
    (signal.SIGTERM, 143),
    (signal.SIGHUP, 129),
    (signal.SIGKILL, -9),
]


@pytest.mark.fault("two runs on one bundle")
def test_two_runs_share_a_bundle(bundle: Path, tmp_path: Path) -> None:
    runs = [start("run", bundle, PROMPT, "-o", f"{i}.gif", *SMALL, cwd=tmp_path) for i in (1, 2)]
    for run in runs:
        _, error = run.communicate(timeout=600)
        assert run.returncode == 0, error
    assert (tmp_path / "1.gif").read_bytes() == (tmp_path / "2.gif").read_bytes()


@pytest.mark.parametrize(("sent", "code"), STOPPED)
@pytest.mark.fault("Ctrl-C")
def test_a_stopped_run_leaves_no_video(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    program = (
        "from functools import partialmethod\n"
        "from wanx.cli import main\n"
        "from wanx.runtime.pipeline import Pipeline\n"
        "tell = lambda *_: print('step', flush=True)\n"
        "Pipeline.run = partialmethod(Pipeline.run, on_step=tell)\n"
        "main()\n"
    )
    arguments = "run", "tiny", PROMPT, "-o", "v.mp4", "--steps", "1000", "--threads", "1"
    run = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == b"step\n"
    run.send_signal(sent)
    _, error = run.communicate(timeout=300)
    assert run.returncode == code
    assert b"Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sent", "code"), STOPPED)
@pytest.mark.fault("kill at any moment", "Ctrl-C")
def test_a_stopped_export_shows_no_bundle(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    export = start("export", "-o", "bundle", cwd=tmp_path)
    deadline = time.monotonic() + 300
    # Weights are there long before the graphs are traced.
    while not list(tmp_path.glob(".bundle*/weights/*")):
        assert time.monotonic() < deadline
        assert export.poll() is None
        time.sleep(0.1)
    export.send_signal(sent)
    _, error = export.communicate(timeout=300)
    assert export.returncode == code, error.decode()
    assert b"Traceback" not in error
    visible = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert visible == []
    if sent != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []
        return
    left = sorted(path.name for path in tmp_path.glob(".bundle.wanx-*"))
    assert len(left) == 1
    assert left[0] in leftovers(tmp_path)
    run = start("run", "tiny", PROMPT, "-q", "-o", "v.png", *ONE, cwd=tmp_path)
    _, error = run.communicate(timeout=300)
    assert (run.returncode, error) == (0, b"")
    assert [path.name for path in tmp_path.iterdir()] == ["v.png"]
    assert "no files" in leftovers(tmp_path)


def leftovers(folder: Path) -> str:
    """Return what ``wanx doctor`` says of the leftovers in a folder."""
    doctor = start("doctor", "--json", cwd=folder)
    out, error = doctor.communicate(timeout=300)
    assert doctor.returncode == 0, error
    (detail,) = (check["detail"] for check in json.loads(out) if check["name"] == "leftovers")
    return str(detail)


def start_writer(path: Path) -> subprocess.Popen[str]:
    """Start a process that is writing a video when this returns, and for a minute."""
    program = (
        "import sys, time, numpy as np\n"
        "from wanx.runtime.output.video import VideoWriter\n"
        "with VideoWriter(sys.argv[1], 64, 64, metadata={}) as writer:\n"
        "    frames = 1 if sys.argv[1].endswith('png') else 9\n"
        "    writer.write(np.random.randint(0, 255, (frames, 64, 64, 3), dtype=np.uint8))\n"
        "    print('writing', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    return child


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
@pytest.mark.fault("kill while writing")
def test_stopped_while_encoding_leaves_no_video(tmp_path: Path, suffix: str) -> None:
    """A plain MP4 is unreadable when its writer dies, so it must not have the asked name yet.

    The next command removes the file that grew; not that of a process that is alive.
    """
    target = tmp_path / f"v{suffix}"
    child = start_writer(target)
    child.kill()
    child.wait()
    assert not target.exists()
    (dead,) = tmp_path.iterdir()
    os.utime(dead)  # young, which says nothing
    (tmp_path / ".wanx-notes.tmp").write_text("not ours")
    assert leftovers(tmp_path).startswith(f"killed commands left {dead.name};")
    alive = start_writer(tmp_path / f"w{suffix}")
    try:
        assert not dead.exists()
        (growing,) = tmp_path.glob(".wanx-*[0-9a-f].tmp")
        os.utime(growing, (0, 0))  # old, which says nothing either
        assert leftovers(tmp_path) == "no files of killed commands here"
        run = start("run", "tiny", PROMPT, "-o", "r.png", *ONE, cwd=tmp_path)
        _, error = run.communicate(timeout=300)
        assert run.returncode == 0, error
        assert growing.exists()
        assert (tmp_path / ".wanx-notes.tmp").exists()
    finally:
        alive.kill()
        alive.wait()


def test_debugging_shows_the_traceback(tmp_path: Path) -> None:
    environment = os.environ | {"WANX_DEBUG": "1"}
    command = [sys.executable, "-m", "wanx", "inspect", str(tmp_path / "nothing")]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode != 0
    assert b"Traceback" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-folder"], "does not exist"),
        (["--precision", "fp4"], "--precision fp4"),
        (["--target", "tpu"], "--target tpu"),
        (["--task", "i2v"], "t2v, not i2v"),
    ],
)
def test_bad_exports_are_one_line(wanx: Wanx, tmp_path: Path, arguments: list, words: str) -> None:
    result = wanx("export", *arguments)
    assert result.code == 2
    assert words in result.error
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_what_an_export_takes(wanx: Wanx, tmp_path: Path) -> None:
    facts = json.loads(wanx("export", "--precision", "bf16", "--dry-run", "--json").out)
    stored = sum(path.stat().st_size for path in (builtin_bundle() / "weights").iterdir())
    assert facts["weight_bytes"]["dit"] * 2 == pytest.approx(
        (builtin_bundle() / "weights" / "dit.safetensors").stat().st_size, rel=0.02
    )
    assert sum(facts["weight_bytes"].values()) < stored
    assert facts["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


ABSURD: list[tuple[list[str], str]] = [
    (["run", "tiny", "a", "--threads", "9999"], "9999"),
    (["run", "tiny", "a", "--threads", "0"], "0"),
    (["run", "tiny", "a", "--threads", "9" * 30], "less than or equal to "),
    (["verify", "tiny", "--threads", "100000"], "100000"),
    (["bench", "tiny", "--threads", "9999"], "9999"),
    (["bench", "tiny", "--repeat", "100000"], "--repeat is 100000; choose 1 to 1000"),
    (["compare", "tiny", "tiny", "--threads", "9999"], "9999"),
    (["run", "tiny", "a", "--count", "10001"], "10001"),
    (["run", "tiny", "a", "--steps", "1001"], "steps is 1001; choose 1 to 1000"),
    (["run", "tiny", "a", "--size", "100000x100000"], "have a latent of "),
    (["run", "tiny", "a", "--frames", str(4 * 10**9 + 1)], "have a latent of "),
    (["run", "tiny", "a", "--size", "9999999999x9999999999"], "9999999999"),
    (["bench", "tiny", "--sizes", "100000x100000"], "have a latent of "),
    (["bench", "tiny", "--frames", "400000001"], "have a latent of "),
    (["compare", "tiny", "tiny", "--size", "100000x100000"], "have a latent of "),
    (["export", "--precision", "int8", "--calibration-size", "100000x100000"], "have a latent of "),
    (["export", "--precision", "int8", "--calibration-prompts", "10001"], "choose 1 to 10000"),
    (["export", "--precision", "int8", "--calibration-steps", "1001"], "choose 1 to 1000"),
    (["export", "--golden-steps", "101"], "choose 0 to 100"),
    (["build", "b", "--target", "rtx:sm89", "--workspace", "2048G"], "choose 1 to 1099511627776"),
]


@pytest.mark.parametrize(("arguments", "words"), ABSURD, ids=str)
@pytest.mark.fault("number without bounds")
def test_no_number_buys_a_whole_machine(
    wanx: Wanx, tmp_path: Path, arguments: list[str], words: str
) -> None:
    start = time.monotonic()
    result = wanx(*arguments)
    assert result.code == 2, result.err
    assert words in result.error
    assert time.monotonic() - start < 30
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_too_many_prompts(wanx: Wanx, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n" * 100_001)
    result = wanx("run", "--prompts", "p.txt", *ONE)
    assert result.code == 2
    assert "p.txt has 100001 lines, and at most 100000 are read; split it" in result.error


FOLDERS = [b"b\xff", "猫 🐱".encode(), b"-a b'c\"$(d)"]


@pytest.mark.parametrize("name", FOLDERS, ids=ascii)
@pytest.mark.fault("folder of any name")
def test_a_bundle_s_folder_may_have_any_name(wanx: Wanx, tmp_path: Path, name: bytes) -> None:
    """Not all names are UTF-8, and none is code."""
    bundle = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    shutil.copytree(builtin_bundle(), bundle)
    few = ["--size", "32x32", "--frames", "5", "--threads", "1", "--steps", "1"]
    threads = ["--threads", "1", "-q"]
    bench = ["--sizes", "32x32", "--frames", "5", "--steps", "1", "--warm-up", "0", "--repeat", "1"]
    for arguments in (
        ["inspect", bundle],
        ["verify", bundle, *threads],
        ["run", bundle, PROMPT, "-o", bundle / "v.gif", "-q", *few],
        ["compare", bundle, "tiny", "--no-clips", "-q", "-o", tmp_path / "compared", *few],
        ["bench", bundle, "--no-roofline", "-o", tmp_path / "report", *bench, *threads],
        ["build", bundle, "--target", "cpu", "-q"],
    ):
        for json_flag in ([], ["--json"]):
            result = wanx(*arguments, *json_flag)
            assert result.code == 0, (arguments, result.err)
            if json_flag:
                json.loads(result.out)
    assert (bundle / "v.gif").exists()
    for path in (tmp_path / "compared", tmp_path / "report"):
        for file in path.iterdir():
            file.read_text(encoding="utf-8")
