"""Exported folders that somebody has tampered with: `moelet import` refuses them, or they are still a model.

Run by its path it is the victim: it imports one mutated folder after the other, and says how each went.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TinySettings
from scorecard import Trials

from moelet.errors import UserError
from moelet.export.importing import import_hf
from moelet.tokenizer import Tokenizer

FILES = ("config.json", "model.safetensors", "tokenizer.model")
VALUES = (0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, 1e308, True, None, "", "../x", [], [1], {}, {"a": 1})
HEADER = 4000  # bytes: the names, shapes and places of the tiny model's tensors are in the first of them


def mutate(data: bytes, name: str, chance: random.Random) -> bytes:
    """Return a file with some bytes changed, cut, doubled, or, in JSON, a value that is another."""
    if name == "config.json" and chance.random() < 0.7:
        config: dict[str, Any] = json.loads(data)
        for _ in range(chance.randrange(1, 4)):
            config[chance.choice(list(config))] = chance.choice(VALUES)
        return json.dumps(config).encode()
    end = min(len(data), HEADER) if chance.random() < 0.8 else len(data)
    at, kind = chance.randrange(end), chance.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at : at + chance.randrange(1, 60)] + data[at:]
    if kind == 2:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    return data[:at] + chance.randbytes(chance.randrange(1, 12)) + data[at + 8 :]


def victim(folder: Path, settings: Path, seeds: range) -> None:
    """Import the folder once for each seed, mutated, and print `SEED survived` or what it was."""
    for seed in seeds:
        print(seed, end=" ", flush=True)
        chance, name = random.Random(seed), FILES[seed % len(FILES)]
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(mutate(whole, name, chance))
        try:
            import_hf(folder, folder.with_name("run"), settings)
            how = "survived"
        except UserError:
            how = "survived"
        except Exception as error:
            how = f"{type(error).__name__}: {str(error)[:200]!r}"
        shutil.rmtree(folder.with_name("run"), ignore_errors=True)
        (folder / name).write_bytes(whole)
        print(how, flush=True)


@pytest.mark.check(31)
def test_mutated_folders(trials: Trials, tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """No signal, no hang, no other error than ours."""
    from test_export import SHAPES, load, make_run, write_folder  # beside tests/conftest.py

    run = make_run(tmp_path / "whole", tiny_settings(model=SHAPES["factorised"]), tokenizer)
    folder = write_folder(tmp_path / "folder", *load(run)[:2], False)
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_settings()))
    seeds = range(trials.count(small=12, full=1000))
    command = [sys.executable, __file__, str(folder), str(tmp_path / "tiny.json"), str(len(seeds))]
    places = {"PYTHONPATH": ":".join(str(Path(__file__).parents[level]) for level in (1, 2))}
    done = subprocess.run(command, env=places, capture_output=True, text=True, timeout=60 + 10 * len(seeds))
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    for seed in seeds:
        with trials.one(f"seed {seed}"):
            assert told.get(str(seed)) == "survived", (told.get(str(seed)), done.returncode, done.stderr[-300:])


if __name__ == "__main__":
    victim(Path(sys.argv[1]), Path(sys.argv[2]), range(int(sys.argv[3])))
