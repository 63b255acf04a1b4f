"""A rank that dies, hangs or fails, at any point, saving included."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TinySettings
from crew import Crew, Ranks, ranks
from processes import assert_same_run
from scorecard import Trials

from moelet.storage.manifest import newest

STEPS, SILENT = 6, 3.0
Fault = tuple[Ranks, int, str, str, int]  # the layout, which rank, what happens to it, at which call of what
DATA, EXPERT, SHARD = ranks(data=2), ranks(expert=2), ranks(shard=2)
FEW: list[Fault] = [(SHARD, 0, "stop", "step", 3), (DATA, 1, "stop", "step", 3), (EXPERT, 1, "error", "parts", 2)]


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    with Crew(tmp_path_factory.mktemp("crew") / "said", SILENT) as crew:
        yield crew


def settings(tiny_settings: TinySettings, layout: Ranks, folder: Path) -> Path:
    length = {"train_steps": STEPS, "checkpoint_steps": 1, "eval_steps": 3}
    path = folder / f"{layout}.json".replace(" ", "-")
    path.write_text(json.dumps(tiny_settings(train=length, parallel=layout.settings)))
    return path


def drawn(trials: Trials) -> list[Fault]:
    found: list[Fault] = []
    for layout in (DATA, EXPERT, SHARD, ranks(data=2, expert=2)):
        for kind in ("kill", "stop", "error"):
            for place in ("step", "forward", "evaluation"):
                call = trials.random.randint(1, 2 if place == "evaluation" else 5)
                found.append((layout, trials.random.randrange(layout.count), kind, place, call))
    found += [(EXPERT, 1, kind, "parts", trials.random.randint(1, 5)) for kind in ("kill", "stop", "error")]
    found += [(SHARD, 1, kind, "parts", trials.random.randint(1, 5)) for kind in ("kill", "stop", "error")]
    found += [(SHARD, 0, kind, "save", trials.random.randint(6, 12)) for kind in ("kill", "stop", "error")]
    return found


@pytest.mark.check(29)
def test_a_rank_that_dies_hangs_or_fails(
    trials: Trials, crew: Crew, tiny_settings: TinySettings, tmp_path: Path
) -> None:
    """The others end, with an exit code other than 0, and name it; the run then goes on from its newest whole
    checkpoint and is the one it would have been, to the last bit."""
    whole: dict[Ranks, Path] = {}
    for number, (layout, victim, kind, place, call) in enumerate(drawn(trials) if trials.full else FEW):
        with trials.one(f"{layout}, rank {victim}: {kind} at call {call} of {place}"):
            path, run = settings(tiny_settings, layout, tmp_path), tmp_path / str(number)
            if layout not in whole:
                whole[layout] = tmp_path / f"whole-{len(whole)}"
                crew.train(layout.count, path, "--run", whole[layout])
            began = time.monotonic()
            pids = crew.start(layout.count, "train_with_fault", victim, kind, place, call, path, "--run", run)
            ended = crew.wait_for([pid for pid in pids if pid != pids[victim]], seconds=60)
            took = time.monotonic() - began
            for pid in pids[victim : victim + 1] if ended else pids:
                crew.kill(pid)
            codes, said = crew.wait(), crew.said()
            assert ended and 0 not in codes, said
            for rank in set(range(layout.count)) - {victim}:
                assert f"rank {victim} " in crew.texts()[rank] and "--resume" in crew.texts()[rank], said
                assert kind != "error" or "KeyError: 'planted'" in crew.texts()[rank], said
            assert took < 30 or not trials.full, said
            assert newest(run)[1] == [], "nothing half written has a checkpoint's name"
            crew.train(layout.count, "--resume", run)
            assert_same_run(run, whole[layout])
