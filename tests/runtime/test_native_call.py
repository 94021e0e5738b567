"""Native calls that raise, panic, print or never end, and the process's stderr afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from wanx.runtime.native_call import NativeError, call_native, silenced_stderr


def test_results_and_errors() -> None:
    assert call_native(lambda: None, 5) is None
    assert call_native(lambda: [1], 5) == [1]

    def fail(error: BaseException) -> None:
        raise error

    for error in (ValueError("a\n b"), SystemExit("a b"), KeyboardInterrupt("a b")):
        with pytest.raises(NativeError, match=r"^a b$") as caught:
            call_native(lambda error=error: fail(error), 5)  # type: ignore[misc]
        assert caught.value.__cause__ is error


def test_what_does_not_end_is_left_behind() -> None:
    ended = threading.Event()
    start = time.monotonic()
    with pytest.raises(NativeError, match=r"it did not end within 0\.1 s"):
        call_native(ended.wait, 0.1)
    assert time.monotonic() - start < 30
    ended.set()


def test_a_panic_of_rust_is_one_error() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(0)
    with pytest.raises(NativeError, match="chunk size must be non-zero"):
        call_native(lambda: tokenizer.encode("a b"), 5)


def test_what_others_write_meanwhile_comes_after(capfd: pytest.CaptureFixture[str]) -> None:
    """Bars are drawn by another thread; an error's noise is dropped."""

    def noisy(fails: bool) -> None:
        os.write(2, b"bar\n")
        if fails:
            raise ValueError("cannot")

    call_native(lambda: noisy(False), 5)
    assert capfd.readouterr().err == "bar\n"
    with pytest.raises(NativeError):
        call_native(lambda: noisy(True), 5)
    with silenced_stderr(always=True):
        noisy(False)
    assert capfd.readouterr().err == ""


def test_stderr_is_silent_in_the_block_and_itself_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        barrier.wait()
        for _ in range(50):
            with silenced_stderr(always=True):
                os.write(2, b"noise\n")
                time.sleep(0.0001 * number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


@pytest.mark.parametrize("closed", ["", "2>&-"])
def test_a_closed_stderr_stays_closed(closed: str) -> None:
    code = (
        "import os\nfrom wanx.runtime.native_call import call_native\n"
        "before = os.listdir('/proc/self/fd')\n"
        "assert call_native(lambda: 3, 5) == 3\n"
        "assert os.listdir('/proc/self/fd') == before\nprint('done')"
    )
    command = f'"{sys.executable}" -c "{code}" {closed}'
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "done\n"
