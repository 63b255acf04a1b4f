"""Batch size "auto": what is found fits, is the run that the same size by hand is, and stays at a resume."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings
from processes import Zygote, assert_same_run
from processes import rows as metrics_rows
from test_resume import train_until

from moelet import fit
from moelet.console import Progress
from moelet.data import START, training_batches
from moelet.errors import UserError
from moelet.fit import Found, evenly, largest_that_fits, throwaway_batch
from moelet.hparams import make_hparams, read_hparams
from moelet.memory import free_memory
from moelet.tokenizer import Tokenizer
from moelet.train import resume, start

# 1. the search


class Curve:
    """In the place of a process: peaks by formula. The first one and the fresh ones that confirm may differ."""

    def __init__(self, formula: Callable[[int], float]) -> None:
        self.formula, self.started, self.tried = formula, 0, list[int]()

    def __call__(self) -> Any:
        self.started += 1
        return self

    def __enter__(self) -> "Curve":
        return self

    def __exit__(self, *what: object) -> None:
        pass

    def peak(self, rows: int) -> float:
        self.tried.append(rows)
        return self.formula(rows)


@pytest.mark.parametrize("room", [11.0, 12.5, 40.0, 99.0, 1000.0])
@pytest.mark.parametrize(
    "formula",
    [
        lambda rows: 10.0 + rows,
        lambda rows: max(30.0, 10.0 + rows),  # saving takes more than a few rows do
        lambda rows: max(11.0, 3.0 * rows - 10),
        lambda rows: 10.0 + rows if rows < 50 else math.inf,  # a card's end
    ],
    ids=["line", "flat first", "knee", "end"],
)
def test_the_largest_that_fits_is_found(formula: Callable[[int], float], room: float) -> None:
    """On lines exactly; on bent ones never too large, and with no more micro-steps than a row less needs."""
    most, curve = 120, Curve(formula)
    found = largest_that_fits(curve, most, room)
    best = max((rows for rows in range(1, most + 1) if formula(rows) <= room), default=0)
    if best == 0:
        assert found.rows == 0 and found.peaks[1] > room
        return
    assert formula(found.rows) <= room and found.rows == evenly(most, found.rows)
    assert curve.tried[-1] == found.rows and curve.started > 1, "confirmed by a fresh process"
    assert found.rows >= evenly(most, best) / 2
    if formula(1) == 11.0 and formula(60) == 70.0:
        assert found.rows == evenly(most, best)


def test_no_try_is_far_larger_than_what_fits() -> None:
    curve = Curve(lambda rows: 100.0 + rows)
    largest_that_fits(curve, 10_000, 150.0)
    assert max(curve.tried) <= 64


def test_a_size_that_fails_afresh_gives_way_to_a_smaller_one() -> None:
    """The first process said less than fresh ones do."""
    curve = Curve(lambda rows: 10.0 + rows * (1 if curve.started == 1 else 2))
    found = largest_that_fits(curve, 16, 20.0)
    assert found.rows == 4 and found.peaks[4] == 18.0


@pytest.mark.parametrize(("total", "rows", "even"), [(30, 30, 30), (30, 29, 15), (30, 9, 8), (31, 9, 8), (7, 1, 1)])
def test_rows_are_shared_evenly(total: int, rows: int, even: int) -> None:
    assert evenly(total, rows) == even
    assert math.ceil(total / even) == math.ceil(total / rows)


# 2. the machine


def machine(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


PLENTY = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": "5000\n",
                "sys/fs/cgroup/a/memory.current": "3000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 700\n",
            },
            2700,
        ),
        (
            {
                "proc/self/cgroup": "9:cpu:/x\n4:memory:/not/seen/from/here\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5001\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
            },
            0,
        ),
    ],
    ids=["machine", "version 2", "version 1"],
)
def test_free_memory_is_that_of_the_machine_or_of_the_group(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert free_memory(machine(tmp_path, PLENTY | files)) == expected


def test_a_system_that_does_not_say_asks_for_a_limit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not say how much memory is free.*set train\.memory_limit_gb"):
        free_memory(tmp_path)


# 3. the steps that are tried


def test_running_out_of_memory_is_an_answer_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_settings: TinySettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    """As on a card: five rows fit, nine don't; a CPU's allocator says the same in other words."""
    tokenizer.save(tmp_path / "tokenizer.model")
    given = tiny_settings(train={"batch_size": "auto", "global_batch_size": 12})
    real, sizes = fit.train_step, list[list[int]]()

    def small_card(training: Any, batches: Any) -> Any:
        sizes.append([len(batch.labels) for batch in batches])
        if sizes[-1][0] == 9:
            raise torch.OutOfMemoryError
        if sizes[-1][0] == 12:
            torch.empty(10**15)
        return real(training, batches)

    monkeypatch.setattr(fit, "train_step", small_card)
    monkeypatch.setattr(fit, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(fit.sys, "argv", ["fit", str(tmp_path / "tokenizer.model")])
    monkeypatch.setattr(fit.Path, "write_text", lambda path, text: len(text))
    monkeypatch.setattr(fit.sys, "stdin", iter_lines([json.dumps(given), "5", "9", "12", "1"]))
    fit.main()
    answers = [float(line) for line in capsys.readouterr().out.split()]
    assert [math.isinf(answer) for answer in answers] == [False, True, True, False]
    assert sizes == [[1], [5, 5], [5, 5], [9, 3], [12], [1, 1], [1, 1]], "two micro-steps, or all there is"


class iter_lines:
    """Standard input that holds `lines`."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = iter(lines)

    def __iter__(self) -> Iterator[str]:
        return self.lines

    def readline(self) -> str:
        return next(self.lines)


def test_a_batch_of_throwaway_rows_has_a_mask(tiny_settings: TinySettings, tokenizer: Tokenizer) -> None:
    batch = throwaway_batch(make_hparams(tiny_settings()), tokenizer.vocab_size, 3)
    assert batch.input_ids.shape == (3, 32) and batch.segments is not None
    assert batch.segments.sum() == 3 * 32 - 1


# 4. the data


def test_rows_of_a_step_do_not_depend_on_how_it_is_cut(tiny_settings: TinySettings, tokenizer: Tokenizer) -> None:
    settings = make_hparams(tiny_settings()).data
    whole = training_batches(settings, tokenizer, 32, [7], 0, START)
    cut = training_batches(settings, tokenizer, 32, [3, 3, 1], 0, START)
    for batch, cursor in itertools.islice(whole, 40):
        parts = list(itertools.islice(cut, 3))
        assert torch.equal(torch.cat([part.input_ids for part, _ in parts]), batch.input_ids)
        assert torch.equal(torch.cat([part.labels for part, _ in parts]), batch.labels)
        assert parts[-1][1] == cursor


# 5. at a resume


@pytest.fixture
def finds_five(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """In the place of the search: five rows fit. Returns the rooms that were asked for."""
    rooms: list[float] = []

    def found(rehearse: Any, most: int, room: float) -> Found:
        rooms.append(room)
        return Found(5, {1: 1.0, 5: 5.0})

    monkeypatch.setattr(fit, "largest_that_fits", found)
    return rooms


AUTO = {"batch_size": "auto", "global_batch_size": 12, "memory_limit_gb": 9.0}


def test_a_resumed_run_keeps_its_size_and_is_the_run_with_the_size_set_by_hand(
    monkeypatch: pytest.MonkeyPatch,
    finds_five: list[float],
    tiny_settings: TinySettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    tokenizer.save(tmp_path / "given.model")
    given = tiny_settings(tokenizer={"file": str(tmp_path / "given.model")}, train=AUTO | {"checkpoint_steps": 2})
    by_hand = tiny_settings(tokenizer=given["tokenizer"], train=given["train"])
    by_hand["train"] |= {"batch_size": 5, "memory_limit_gb": None}
    train_until(monkeypatch, tmp_path / "hand", by_hand, None)
    assert finds_five == []
    (tmp_path / "settings.json").write_text(json.dumps(given))
    train_until(monkeypatch, tmp_path / "auto", given, 3)
    resume(tmp_path / "auto", [], Progress(), settings=tmp_path / "settings.json")
    assert len(finds_five) == 1, "found once, and kept although the file says auto"
    assert read_hparams(tmp_path / "auto" / "hparams.json") == read_hparams(tmp_path / "hand" / "hparams.json")
    assert_same_run(tmp_path / "auto", tmp_path / "hand")


def test_a_resume_that_asks_for_it_finds_a_new_size_for_the_same_steps(
    monkeypatch: pytest.MonkeyPatch,
    finds_five: list[float],
    tiny_settings: TinySettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    """Another cut of a step is rounding and, without dropout, nothing else; another step is another run."""
    tokenizer.save(tmp_path / "given.model")
    given = tiny_settings(
        model={"dropout": 0.0},
        tokenizer={"file": str(tmp_path / "given.model")},
        train={"batch_size": 8, "global_batch_size": 12, "checkpoint_steps": 2},
    )
    train_until(monkeypatch, tmp_path / "whole", given, None)
    train_until(monkeypatch, tmp_path / "cut", given, 3)
    with pytest.raises(UserError, match=r"train.global_batch_size: the run has 12, given is 16"):
        resume(tmp_path / "cut", ["train.global_batch_size=16"], Progress())
    with pytest.raises(UserError, match="memory_limit_gb is 2 and batch_size is 8"):
        resume(tmp_path / "cut", ["train.memory_limit_gb=2"], Progress())
    resume(tmp_path / "cut", ["train.batch_size=auto", "train.memory_limit_gb=9"], Progress())
    assert len(finds_five) == 1 and read_hparams(tmp_path / "cut" / "hparams.json").batch_size == 5
    pairs = zip(metrics_rows(tmp_path / "cut"), metrics_rows(tmp_path / "whole"), strict=True)
    for cut, whole in pairs:
        assert cut["loss"] == pytest.approx(whole["loss"], abs=1e-6) and cut["tokens"] == whole["tokens"]


def test_the_room_is_the_limit_without_what_the_run_holds(
    monkeypatch: pytest.MonkeyPatch, finds_five: list[float], tiny_settings: TinySettings, tmp_path: Path
) -> None:
    """Without a limit it is nine tenths of what is free, with what the process has already."""
    monkeypatch.setattr(fit, "peak_memory_mb", lambda device: 300.0)
    monkeypatch.setattr(fit, "free_memory", lambda: 700 * fit.MIB)
    for limit, expected in ((2.0, 2048), (None, 900)):
        given = tiny_settings(train=AUTO | {"memory_limit_gb": limit, "train_steps": 1})
        start(make_hparams(given), tmp_path / str(limit), Progress())
        text = expected - 300 - fit.REST_BYTES / fit.MIB - finds_five[-1] * (1 + fit.GAPS) / fit.MIB
        assert 0 < text < 2, "two windows of 64 pieces"


# 6. whole runs, on memory as it is

# a row takes some 10 MB, most of it in attention
ROOMY = {"max_length": 256, "d_model": 64, "n_layers": 2, "n_heads": 8, "d_ff": 256, "dropout": 0.0}


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    found = Zygote(tmp_path_factory.mktemp("zygote") / "out.txt")
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture(scope="module")
def settings(tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roomy")
    tokenizer.save(folder / "given.model")
    steps = {"batch_size": 12, "global_batch_size": 12, "train_steps": 2}
    given = tiny_settings(model=ROOMY, tokenizer={"file": str(folder / "given.model")}, train=steps)
    (folder / "settings.json").write_text(json.dumps(given))
    return folder / "settings.json"


@pytest.fixture(scope="module")
def at_once(zygote: Zygote, settings: Path) -> list[dict[str, Any]]:
    """The metrics of the run that takes its steps in one piece."""
    zygote.run("train", settings, "--run", settings.parent / "whole")
    return metrics_rows(settings.parent / "whole")


@pytest.fixture(scope="module")
def one_row(zygote: Zygote, settings: Path) -> float:
    """What a run of single rows needs, in GB, as a limit that is too small says."""
    run = settings.parent / "small"
    zygote.start("train", settings, "--run", run, *auto_within(0.1))
    assert zygote.wait() == 78
    said = zygote.said()
    assert "0.10 GB given" in said and "Raise train.memory_limit_gb" in said
    assert not (run / "checkpoints").exists()
    return float(said.partition("a single row needs ")[2].split()[0])


def auto_within(limit: float) -> list[str]:
    return ["--set", "train.batch_size=auto", "--set", f"train.memory_limit_gb={limit}"]


@pytest.mark.parametrize("more", [0.02, *(pytest.param(more, marks=pytest.mark.nightly) for more in (0.1, 0.6))])
def test_what_is_found_fits_and_learns_the_same(
    zygote: Zygote, settings: Path, at_once: list[dict[str, Any]], one_row: float, tmp_path: Path, more: float
) -> None:
    zygote.run("train", settings, "--run", tmp_path / "run", *auto_within(one_row + more))
    size = read_hparams(tmp_path / "run" / "hparams.json").batch_size
    assert f"batch size: {size} of a step's 12 rows at a time" in zygote.said()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["memory_mb"] for line in lines) <= (one_row + more) * 1024
    assert (size == 12) == (more == 0.6), "it isn't always all rows, nor always few"
    for found, expected in zip(metrics_rows(tmp_path / "run"), at_once, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert found["tokens"] == expected["tokens"]
