"""The commands and the code of the README do what it says, on the built-in model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT
from tools.repackage import save, tensors_of, write_dit, write_others
from wanx.exporter.source import open_source

README = (ROOT / "README.md").read_text()

# The README speaks of a 14B; here the built-in model stands in for it, at its own size.
STAND_INS = {
    "wanx export t2v-14B": "wanx export tiny",
    "--size 832x480 --frames 81 --steps 50": "--size 64x64 --frames 17 --steps 4",
    "--steps 10 -o speed/": "--steps 3 --repeat 1 -o speed/",
    "width=832, height=480, frames=81": "width=64, height=64, frames=17, steps=4",
    "--dit wan2.1_t2v_14B_fp8_scaled": "--dit tiny --tokenizer tokenizer.json",
    "a cat surfing at sunset": "a red circle moving right on a blue background",
}


def stand_in(text: str) -> str:
    for said, done in STAND_INS.items():
        text = text.replace(said, done)
    return text


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def run(command: list[str], folder: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"


def comfyui(folder: Path) -> None:
    """The built-in model as ComfyUI's folder of models, and a LoRA."""
    checkpoint, models = open_source("tiny"), folder / "ComfyUI" / "models"
    tensors = tensors_of(checkpoint.components["dit"])
    write_dit(tensors, models / "diffusion_models", "tiny", "fp8_scaled")
    list(write_others(checkpoint, models))
    (folder / "tokenizer.json").write_bytes(checkpoint.tokenizer.to_json())
    bias = "blocks.0.self_attn.q.bias"
    change = {f"diffusion_model.{bias.removesuffix('.bias')}.diff_b": tensors[bias]}
    save(change, folder / "style.safetensors")


def test_commands_and_code_run_in_order(tmp_path: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(stand_in(line), comments=True) for line in lines]
    wanx = [words for words in commands if words and words[0] == "wanx"]
    commands_shown = {"run", "export", "build", "compare", "bench", "inspect", "verify", "doctor"}
    assert {words[1] for words in wanx} == commands_shown
    line = '{"prompt": "a cat", "seed": 7, "output": "cat.mp4"}'
    assert line in README
    (tmp_path / "prompts.jsonl").write_text(line)
    comfyui(tmp_path)
    for words in wanx:
        run([sys.executable, "-m", *words], tmp_path)
    assert (tmp_path / "out.mp4").stat().st_size > 0
    for name in ("cat.mp4", "cat-1.png", "cat-4.png", "videos/cat.mp4"):
        assert (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "report" / "accuracy.html").stat().st_size > 0
    assert (tmp_path / "speed" / "report.html").stat().st_size > 0
    (code,) = blocks("python")
    check = "\nassert video.frames.shape == (17, 64, 64, 3)\n"
    run([sys.executable, "-c", stand_in(code) + check], tmp_path)


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in blocks("sh")[0].splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "make"
        assert re.search(rf"^{words[1]}:", makefile, re.M)
