"""How ranks divide a run: sizes, parts, rows. What they then make of it is tests/faults/test_ranks_alike.py's."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TinySettings
from crew import Crew
from processes import assert_same_run, last_step

from moelet.errors import UserError
from moelet.hparams import make_hparams
from moelet.metrics import read_rows
from moelet.parallel import ranks, watch
from moelet.parallel.layout import Layout, Sizes, sizes_for
from moelet.parallel.ranks import Lost, Team
from moelet.parallel.rows import shares
from moelet.sections import ModelSettings, ParallelSettings
from moelet.storage.checkpoint import load
from moelet.storage.manifest import newest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    with Crew(tmp_path_factory.mktemp("crew") / "said") as crew:
        yield crew


def test_sizes_that_do_not_fit_name_those_that_do() -> None:
    model = ModelSettings(n_experts=8, d_ff=64)
    assert sizes_for(ParallelSettings(), model, 4) == (4, 1, 1)
    assert sizes_for(ParallelSettings(shard=2, expert=2), model, 8) == (2, 2, 2)
    with pytest.raises(
        UserError, match=r"there are 3 ranks.*multiple of 2 .*set them to one of 3, 1 and 1, 1, 3 and 1\."
    ):
        sizes_for(ParallelSettings(expert=2), model, 3)
    with pytest.raises(UserError, match=r"there is 1 process.*torchrun --nproc-per-node 2"):
        sizes_for(ParallelSettings(expert=2), model, 1)
    with pytest.raises(UserError, match=r"Set parallel.expert to one of 1, 2, 4, 8"):
        sizes_for(ParallelSettings(expert=3), model, 3)


def test_parts_are_stretches_that_make_the_whole() -> None:
    for sizes in (Sizes(1, 3, 1), Sizes(2, 2, 2), Sizes(1, 4, 2), Sizes(1, 1, 8)):
        world = sizes.data * sizes.shard * sizes.expert
        for name, rows in (("embed.tokens.weight", 10), ("layers.0.mlp.experts.up_proj", 8), ("norm.weight", 1)):
            seen: list[int] = []
            for rank in range(world):
                layout = Layout(Team(rank, world), sizes)
                part = layout.part(name, rows)
                local_rows = torch.empty(rows // (sizes.expert if "experts" in name else 1), 2)
                if layout.place(name, local_rows) is not None:
                    seen += range(part.start, part.stop)
            assert sorted(seen) == list(range(rows))


def test_every_rank_has_as_many_rows() -> None:
    hparams = make_hparams({"train": {"train_steps": 1, "batch_size": 5, "global_batch_size": 7}})
    batches = [type("B", (), {"labels": torch.zeros(n, 4)})() for n in hparams.micro_batches]
    assert shares(batches, 2) == [3, 1]


def test_a_rank_is_lost_when_it_was_alive_and_no_longer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before its first sign of life: a leader may take its time until training begins. Nor after its end."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(watch, "meeting_place", lambda: store)
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.1)
    place = store
    ended: list[int] = []

    def after(seconds: float) -> list[int]:
        time.sleep(seconds)
        return ended

    with watch.Watch(Team(0, 2), "Go on.", ended.append):
        assert after(0.5) == []
        place.set("beat/1", "done")
        assert after(0.5) == []
        place.set("beat/1", "7")
        assert after(1.0) == [75]
    assert place.get("lost").startswith(b"rank 1 hasn't shown any sign of life")


def test_a_rank_that_fails_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    for module in (watch, ranks):
        monkeypatch.setattr(module, "meeting_place", lambda: store)
    with pytest.raises(KeyError), watch.Watch(Team(1, 2), "Go on."):
        raise KeyError("planted\nand more")
    assert store.check(["lost"])  # to get what isn't there would wait for it
    assert store.get("lost") == b"rank 1 ended with KeyError: 'planted\\nand more'."


def torchrun(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]


def test_the_two_rank_quick_start(tmp_path: Path) -> None:
    """The README's own command, for three steps, with a run folder elsewhere; then what it made is used."""
    (command,) = re.findall(r"^torchrun (.+) --resume runs/two$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    run = tmp_path / "two"
    few = ["--set", "train.train_steps=3", "--set", "train.eval_tokens=2000"]
    done = subprocess.run(
        [*torchrun(*command.split()), "--resume", str(run), *few], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 data x 1 shard x 1 expert" in done.stdout and "done in" in done.stdout
    assert [row["step"] for row in read_rows(run)] == [1, 2, 3]
    assert load(run).step == 3


@pytest.mark.nightly
def test_torchrun_starts_a_run_again_that_lost_a_rank(tmp_path: Path, tiny_settings: TinySettings) -> None:
    """With --max-restarts and --resume the run goes on by itself, and is the one it would have been, to the last bit.

    torchrun takes nobody else's word for it: the rank is killed from outside.
    """
    steps = {"train_steps": 60, "checkpoint_steps": 2, "eval_steps": 30}
    (tmp_path / "s.json").write_text(json.dumps(tiny_settings(train=steps, parallel={"expert": 2})))
    runs = [tmp_path / "whole", tmp_path / "cut"]
    for run in runs:
        options = ("--nproc-per-node", 2, "--max-restarts", 2)
        command = torchrun(*options, "train.py", tmp_path / "s.json", "--resume", run)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if run.name == "cut":
            limit = time.monotonic() + 120
            while last_step(run) < 10 and time.monotonic() < limit:
                time.sleep(0.01)
            os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
    assert_same_run(runs[1], runs[0])


def rank_of(parent: int, rank: int) -> int:
    """Return the process of a rank that torchrun, process `parent`, has started."""
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError("there is no such rank")


@pytest.mark.parametrize("fault", [["--set", "train.train_stps=5"], ["--set", "parallel.shard=2"]])
def test_what_is_refused_is_refused_once(
    fault: list[str], crew: Crew, tiny_settings: TinySettings, tmp_path: Path
) -> None:
    """The leader says why; the others end with the same exit code, and without a word."""
    (tmp_path / "s.json").write_text(json.dumps(tiny_settings()))
    crew.start(3, "train", tmp_path / "s.json", "--run", tmp_path / "run", *fault)
    assert crew.wait() == [78, 78, 78], crew.said()
    first, *others = crew.texts()
    assert "moelet: " in first and others == ["", ""]


def test_a_rank_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "JOIN_SECONDS", 0.2)
    store.set("here/2", "1")
    with pytest.raises(Lost, match="of 3 ranks 1 didn't come"):
        ranks._await_all(store, 0, 3)


def test_a_signal_ends_all_ranks_alike(crew: Crew, tiny_settings: TinySettings, tmp_path: Path) -> None:
    """One of them gets it; all save and end as the leader does, and the leader says how to go on."""
    (tmp_path / "s.json").write_text(json.dumps(tiny_settings(train={"train_steps": 5000})))
    run = tmp_path / "run"
    pids = crew.start(2, "train", tmp_path / "s.json", "--run", run)
    limit = time.monotonic() + 60
    while last_step(run) < 3 and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGTERM)
    assert crew.wait() == [143, 143], crew.said()
    first, other = crew.texts()
    assert f"torchrun --nproc-per-node 2 -m moelet train --resume {run}" in first and other == ""
    assert newest(run)[0] is not None
