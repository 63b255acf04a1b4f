"""Checkpoints that an older version of this program wrote: one golden run for each format, as it was made then."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cuts import in_process  # noqa: F401
from golden.make import CUT, STEPS, write_text
from scorecard import Trials

from moelet import train
from moelet.console import Progress
from moelet.errors import UserError
from moelet.generate import Sampling, stream_text
from moelet.storage import checkpoint, manifest
from moelet.storage.checkpoint import load

GOLDEN = sorted((Path(__file__).parent / "golden").glob("format-*"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    assert sum(path.stat().st_size for path in request.param.rglob("*") if path.is_file()) < 200_000
    return shutil.copytree(request.param, tmp_path / "run")


@pytest.mark.check(8)
@pytest.mark.usefixtures("in_process")
def test_a_run_of_an_older_version_goes_on(trials: Trials, old: Path, tmp_path: Path) -> None:
    """It loads, generates, and makes the steps that it would have made then, within what processors differ by."""
    trials.count(small=1, full=1)
    with trials.one("load and generate"):
        loaded = load(old)
        assert loaded.step == CUT
        text = "".join(stream_text(loaded.model, loaded.tokenizer, "one times", 5, Sampling(temperature=0)))
        assert text
    with trials.one("go on"):
        train.resume(old, [f"data.files={write_text(tmp_path)}"], Progress())
        found, expected = lines(old / "metrics.jsonl")[CUT:], lines(old / "expected.jsonl")
        assert [row["step"] for row in found] == list(range(CUT + 1, STEPS + 1))
        for one, other in zip(found, expected, strict=True):
            assert one["tokens"] == other["tokens"] and one["lr"] == other["lr"]
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert manifest.checkpoint_steps(old) == [CUT, STEPS]


@pytest.mark.check(8)
@pytest.mark.usefixtures("in_process")
def test_a_checkpoint_of_a_newer_version(
    trials: Trials, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused by its format, with what to do; nothing is changed, and no older checkpoint is taken instead."""
    saved = checkpoint.read(old, CUT)
    with monkeypatch.context() as patch:
        for module in (checkpoint, manifest):
            patch.setattr(module, "FORMAT", 3)
        checkpoint.save(old, saved._replace(step=CUT + 1))
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*") if path.name != ".lock"}
    for what, work in (
        ("resume", lambda: train.resume(old, [f"data.files={write_text(tmp_path)}"], Progress())),
        ("load", lambda: load(old)),
    ):
        with trials.one(what):
            with pytest.raises(
                UserError, match=f"step {CUT + 1} .*format 3, this version reads 1 and 2.*Nothing was changed"
            ):
                work()
            assert {path: path.stat().st_mtime_ns for path in before} == before
