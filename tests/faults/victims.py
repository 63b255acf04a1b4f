"""What moelet does with a stranger's files, for `hostile.serve`.

FOLDER holds whole ones, and a file `outside` of them that no load may ever show.
"""

import hashlib
import importlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import hostile  # beside this file
import torch
from code_in_files import every_command
from rich.console import Console

from moelet import metrics, report
from moelet.choices import read_task
from moelet.cli import main
from moelet.console import Progress
from moelet.data import training_rows
from moelet.errors import UserError
from moelet.export.importing import import_hf
from moelet.hparams import read_hparams, read_hparams_inside
from moelet.identity import identity
from moelet.parallel.ranks import ALONE
from moelet.sections import DataSettings
from moelet.storage import checkpoint
from moelet.storage.disk import sealed
from moelet.text import shards
from moelet.tokenizer import Tokenizer
from moelet.train import _restored, check, make_tokenizer, pinned, spent_on

importlib.import_module("torch._dynamo")  # what torch's optimizers load in each process: a second of a trial
QUIET = Progress(Console(file=open(os.devnull, "w", encoding="utf-8")))
RUN_FILES = (
    ("hparams.json", 3), ("tokenizer.model", 2), ("metrics.jsonl", 2), ("model.safetensors", 4),
    ("optimizer.safetensors", 3), ("state.json", 4), ("manifest.json", 3), ("accepted.jsonl", 1),
)  # fmt: skip
IMPORT_FILES = (
    ("config.json", 3),
    ("model.safetensors", 3),
    ("model.safetensors.index.json", 3),
    ("tokenizer.model", 1),
)
PREPARED_FILES = (
    ("manifest.json", 4), ("ids.npy", 1), ("piece_ends.npy", 2), ("digests.npy", 1), ("item_ends.npy", 2),
    ("item_kinds.npy", 2), ("tokenizer.model", 1), ("hparams.json", 1), ("made_from.json", 1),
)  # fmt: skip


def pick(files: tuple[tuple[str, int], ...], chance: random.Random) -> str:
    return chance.choices([name for name, _ in files], [weight for _, weight in files])[0]


def place_of(folder: Path, name: str) -> Path:
    return next(path for path in [folder / name, *sorted(folder.rglob(name))] if path.exists())


def bytes_of(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def refuse_canary(tensors: dict[str, torch.Tensor]) -> None:
    shown = [name for name, tensor in tensors.items() if bool((tensor == hostile.CANARY).any())]
    assert not shown, f"{shown} come from outside of the folder"


def reseal(run: Path, whole: bool) -> None:
    """Have the manifest say of the files what they are now, as a stranger who knows the format would."""
    folder = next((run / "checkpoints").iterdir())
    with suppress(Exception):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        manifest.pop("sha256", None)
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            data = (folder / name).read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        with suppress(UserError):
            hparams, tokenizer = checkpoint.load_run_settings(run)
            marks = {"model": hparams.model.fingerprint, "tokenizer": tokenizer.fingerprint}
            manifest["identity"] |= identity(hparams, tokenizer) if whole else marks
        (folder / "manifest.json").write_bytes(sealed(manifest))


def use_run(run: Path, chance: random.Random) -> None:
    """Load the model and compute with it, or resume up to the first row, or read what was measured."""
    action = chance.choice(["load", "load", "resume", "resume", "measured"])
    if action == "load":
        loaded = checkpoint.load(run)
        refuse_canary(loaded.model.state_dict())
        with torch.no_grad():
            loaded.model(torch.arange(min(8, loaded.hparams.model.max_length))[None])
    elif action == "resume":
        spent_on(run)
        hparams = pinned(read_hparams_inside(run, checkpoint.HPARAMS))
        check(hparams)
        training = _restored(hparams, run, QUIET, False, ALONE)
        refuse_canary(training.model.state_dict())
        settings, length = hparams.data, hparams.model.max_length
        next(training_rows(settings, training.tokenizer, length, hparams.train.seed, training.cursor))
    else:
        report.read_metrics(run)
        metrics.read_rows(run)
        metrics.last_elapsed(run)
        metrics.cut_metrics(run, 3)


def hostile_run(folder: Path, seed: int) -> str:
    chance, run = random.Random(seed), hostile.fresh(folder / "run", folder / "spoilt")
    path = place_of(run, pick(RUN_FILES, chance))
    how = hostile.mutate_file(path, folder / "outside.safetensors", chance)
    if how not in ("link", "hard link", "pipe", "device", "sparse") and chance.random() < 0.8:
        if how == "mutate_json" and path.name == "manifest.json":
            with suppress(ValueError, AttributeError, RecursionError):
                manifest = json.loads(path.read_bytes())
                manifest.pop("sha256", None)
                path.write_bytes(sealed(manifest))
        else:
            reseal(run, chance.random() < 0.5)
    return hostile.attempt(lambda: use_run(run, chance), lambda: bytes_of(run))


def hostile_import(folder: Path, seed: int) -> str:
    chance = random.Random(seed)
    place = hostile.fresh(folder / chance.choice(["stock", "own"]), folder / "spoilt")
    name = pick(IMPORT_FILES, chance)
    if not (place / name).exists():  # in one file: say so in an index
        header = (place / "model.safetensors").read_bytes()
        names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]).keys() - {"__metadata__"}
        places = {name: "model.safetensors" for name in sorted(names)}
        for name_ in chance.sample(sorted(names), chance.choice([0, 1, 3])):
            places[name_] = chance.choice([*WAYS_OUT, "model.safetensors"])
        (place / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    hostile.mutate_file(place / name, folder / "outside.safetensors", chance)
    new = folder / "new"
    shutil.rmtree(new, ignore_errors=True)

    def work() -> None:
        import_hf(place, new, folder / "tiny.json")
        refuse_canary(checkpoint.load(new).model.state_dict())

    return hostile.attempt(work, lambda: 3 * bytes_of(place))


WAYS_OUT = [
    "../outside.safetensors",
    "/etc/passwd",
    "sub/../../outside.safetensors",
    "./model.safetensors",
    "..",
    "",
    "a\0b",
]


def hostile_prepared(folder: Path, seed: int) -> str:
    chance, place = random.Random(seed), hostile.fresh(folder / "prepared", folder / "spoilt")
    path = place_of(place, pick(PREPARED_FILES, chance))
    how = hostile.mutate_file(path, folder / "outside.safetensors", chance)
    manifest = place / "manifest.json"
    if path == manifest and how == "mutate_json" and chance.random() < 0.8:
        with suppress(Exception):
            manifest.write_bytes(sealed({k: v for k, v in json.loads(manifest.read_bytes()).items() if k != "sha256"}))

    def work() -> None:
        hparams = read_hparams_inside(place, "hparams.json")
        hparams = hparams.model_copy(update={"data": DataSettings(source="prepared", files=[str(place)])})
        read_hparams_inside(place, "made_from.json")
        if chance.random() < 0.3:
            shards.verify(place)
        make_tokenizer(hparams)
        found = shards.Shards(place)
        for k in range(len(found)):
            found[k]

    return hostile.attempt(work, lambda: bytes_of(place))


def hostile_alone(folder: Path, seed: int) -> str:
    """A settings file, a tokenizer or a task that a person was told to use."""
    chance = random.Random(seed)
    name = chance.choice(["tiny.json", "tokenizer.model", "task.jsonl"])
    path = folder / "spoilt" / name
    path.parent.mkdir(exist_ok=True)
    for leftover in path.parent.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    shutil.copy(folder / name, path)
    hostile.mutate_file(path, folder / "outside.safetensors", chance)

    def work() -> None:
        if name == "tiny.json":
            hparams = pinned(read_hparams(path))
            check(hparams)
        elif name == "tokenizer.model":
            tokenizer = Tokenizer.load(path)
            ids = tokenizer.encode("a \u2581 text\n\u0122\U0001f600 <s>")
            assert ids.max() < tokenizer.vocab_size
            tokenizer.decode(range(tokenizer.vocab_size))
        else:
            read_task(path)

    return hostile.attempt(work, lambda: bytes_of(path.parent))


def code(folder: Path, seed: int) -> str:
    """One command given one file that holds code."""
    trap, command = every_command()[seed]
    place = hostile.fresh(folder, folder.with_name("spoilt"))
    canary = folder.with_name("canary")
    canary.unlink(missing_ok=True)
    trap.set(place, canary)
    os.chdir(place)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    try:
        ended = main(command)
    except BaseException as error:
        ended = f"{type(error).__name__}: {error}"
    if canary.exists():
        return "RAN THE CODE"
    return "survived" if ended in (0, 2, 78) else f"ended with {ended}"


KINDS: dict[str, Callable[[Path, int], str]] = {
    "run": hostile_run, "import": hostile_import, "prepared": hostile_prepared, "alone": hostile_alone,
    "code": code,
}  # fmt: skip


def serve() -> None:
    """Do what each line of the standard input says: a kind, a folder and seeds, as JSON."""
    nothing: Any = lambda handle: None  # noqa: E731  what a power cut would do is check 2's
    os.fsync = nothing
    metrics.RATE_SECONDS, metrics.RATE_SIZE["cpu"] = 0.0, 8
    os.environ["HF_HUB_OFFLINE"] = "1"
    for line in sys.stdin:
        kind, folder, seeds = json.loads(line)
        attack = partial(KINDS[kind], Path(folder))
        hostile.serve(seeds, attack, limited=kind != "code")
        print("done", flush=True)


if __name__ == "__main__":
    serve()
