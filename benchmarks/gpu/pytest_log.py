"""Plugin of pytest that writes each test's outcome at once, so that a crash loses one test.

A line is a JSON object: ``{"test"}`` when a test begins, with ``outcome`` when it ends, and
``{"finished"}`` when all have run. Tests whose outcome is in the log already do not run again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu.status import EXIT_DEVICE_LOST

LOG = "WANX_PYTEST_LOG"
_WIDTH = 200


def read_log(log: Path) -> tuple[dict[str, dict[str, Any]], str | None, bool]:
    """The outcomes by test, the test that has begun and not ended, and whether all have run."""
    outcomes: dict[str, dict[str, Any]] = {}
    running, finished = None, False
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    for line in lines:
        record = json.loads(line)
        finished = "finished" in record
        if "outcome" in record:
            outcomes[record["test"]] = record
            running = None
        elif "test" in record:
            running = record["test"]
    return outcomes, running, finished


def _write(record: dict[str, Any]) -> None:
    with open(os.environ[LOG], "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out the tests whose outcome is known."""
    known = read_log(Path(os.environ[LOG]))[0]
    done = [item for item in items if item.nodeid in known]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in known]


def pytest_collectreport(report: Any) -> None:
    """Note a file that cannot be imported."""
    if report.failed:
        _note(report, "failed")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note that a test begins."""
    _write({"test": nodeid})


def pytest_runtest_logreport(report: Any) -> None:
    """Note how a test ended; end the process where the GPU does not answer any more."""
    if report.when == "call" or report.outcome != "passed":
        _note(report, report.outcome)
    if report.failed and _device_lost():
        os._exit(EXIT_DEVICE_LOST)


def pytest_sessionfinish(exitstatus: int) -> None:
    """Note that all tests have run."""
    if exitstatus in (0, 1, 5):
        _write({"finished": True})


def _note(report: Any, outcome: str) -> None:
    reason = None
    if outcome != "passed":
        text = report.longrepr
        if isinstance(text, tuple):  # of a skip: file, line, reason
            text = text[2]
        crash = getattr(text, "reprcrash", None)
        lines = str(crash.message if crash else text).strip().splitlines() or ["no reason"]
        reason = (lines[0] if crash else lines[-1])[:_WIDTH]
    numbers = dict(getattr(report, "user_properties", ()))
    _write(
        {
            "test": report.nodeid,
            "outcome": outcome,
            "seconds": getattr(report, "duration", 0.0),
            "numbers": {n: v for n, v in numbers.items() if isinstance(v, (int, float, str))},
            "reason": reason,
        }
    )


def _device_lost() -> bool:
    """Check for a sticky CUDA error, which would fail every test that follows."""
    import torch

    from benchmarks.gpu.context import usable

    return torch.cuda.is_initialized() and not usable(torch.device("cuda"))
