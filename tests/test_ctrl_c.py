"""Ctrl-C while a command imports what it needs, where libraries take any exception for their own; and later."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moelet.stopping import ctrl_c_ends_imports

ROOT = Path(__file__).parent.parent
PRESSED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with `&`

class Library:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                sum(range(1000))
            except BaseException as error:
                print("swallowed", type(error).__name__)

sys.meta_path.insert(0, Library())
import moelet.cli, moelet.errors

def work(*arguments):
    try:
        import wave
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))
    finally:
        print("cleaned up")

moelet.cli.refuse_held = work
sys.exit(moelet.cli.main(sys.argv[2:]))
"""


def pressed(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command, with Ctrl-C as it comes to import a module."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PRESSED, module, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("moelet.generate", ["generate", "none", "--prompt", "x"]),
        ("torch", ["generate", "none", "--prompt", "x"]),  # from far within
        ("moelet.upcycle", ["upcycle", "none", "--run", "x"]),
    ],
)
def test_in_the_imports_of_a_command_it_ends_at_once(module: str, arguments: list[str]) -> None:
    done = pressed(module, *arguments)
    assert done.returncode == 130 and done.stdout == "", done
    assert "interrupted outside of training; run the same command again" in done.stderr


def test_in_work_it_is_the_exception_that_it_always_is() -> None:
    """Imports within work are work: what has been begun is cleaned up."""
    done = pressed("wave", "train", "none.json")
    assert done.stdout == "swallowed KeyboardInterrupt\ncleaned up\n" and done.returncode == 130
    assert "interrupted outside of training" in done.stderr


def test_nothing_of_it_stays() -> None:
    before = signal.getsignal(signal.SIGINT)
    with ctrl_c_ends_imports():
        assert (signal.getsignal(signal.SIGINT) is before) == (before is not signal.default_int_handler)
    assert signal.getsignal(signal.SIGINT) is before
    failed: list[Exception] = []

    def elsewhere() -> None:
        try:
            with ctrl_c_ends_imports():
                assert signal.getsignal(signal.SIGINT) is before
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not failed
