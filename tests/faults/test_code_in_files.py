"""Files that would run a stranger's code, given to every command that takes a path, where each would look for them."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import code_in_files  # beside this file
import hostile
import pytest
from scorecard import Trials
from test_hostile_files import whole  # noqa: F401  a fixture


@pytest.mark.check(30)
def test_a_file_with_code_in_it(trials: Trials, whole: Path, tmp_path: Path) -> None:  # noqa: F811
    """No command runs it: pickles, arrays of objects, YAML tags, templates, modules, `auto_map`, dataset scripts."""
    commands = code_in_files.every_command()
    folder = Path(shutil.copytree(whole, tmp_path / "whole"))
    seeds = list(range(len(commands)))
    chosen = seeds if trials.full else trials.random.sample(seeds, 6)
    for seed, how in hostile.ask("code", folder, chosen).items():
        trap, command = commands[seed]
        with trials.one(f"{trap.name}: moelet {' '.join(command)}"):
            assert how == "survived", how


def test_the_files_do_run_code_elsewhere(tmp_path: Path) -> None:
    """Else it would say nothing that they don't here."""
    lines, canaries = [], {}
    for number, (make, load) in enumerate(code_in_files.CONTROLS.items()):
        canary, path = tmp_path / f"canary-{number}", tmp_path / f"file-{number}"
        path.write_bytes(make(canary, code_in_files.python_line(canary)))
        lines += ["try:", f"    path = {str(path)!r}; {load}", "except Exception as error:", "    print(error)"]
        if not any(name in load and find_spec(name) is None for name in ("yaml", "jinja2")):
            canaries[make.__name__] = canary
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    silent = [name for name, canary in canaries.items() if not canary.exists()]
    assert not silent, done.stdout + done.stderr


def test_there_are_enough_of_them() -> None:
    assert len(code_in_files.TRAPS) >= 50
    assert {command[0] for _, command in code_in_files.every_command()} >= {
        *("train", "generate", "evaluate", "inspect", "import", "export", "upcycle", "prepare", "tokenizer"),
    }
