"""The thread that reads ahead dies or hangs: it is begun anew from its cursor, or the run ends saved."""

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TinySettings
from cuts import Step, in_process, train_until  # noqa: F401  a fixture
from processes import Zygote, assert_same_run, newest, wait_for_step
from scorecard import Trials

from moelet import data
from moelet.errors import TemporaryError, UserError
from moelet.text import prefetch, sources
from moelet.text.documents import Cursor
from moelet.text.prefetch import NAME, Reader
from moelet.text.pulse import beat
from moelet.tokenizer import Tokenizer

PATIENCE = 0.3  # seconds of silence, in the place of 300


def stuck(released: threading.Event) -> Callable[[], None]:
    def wait() -> None:
        released.wait(30)

    return wait


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


ERRORS: dict[str, BaseException] = {
    "MemoryError": MemoryError(),
    "an input/output error": OSError(5, "Input/output error"),
    "a stale file handle": OSError(116, "Stale file handle"),
    "a bug": AssertionError("never"),
    "SystemExit": SystemExit(3),
}


class Faults:
    """Reads the source of files, and makes faults at the items given, counted over all passes of the reader: each once,
    or, `forever`, whenever that item comes again."""

    def __init__(self, faults: dict[int, Callable[[], None]], forever: bool = False) -> None:
        self.faults, self.forever, self.count = faults, forever, 0
        self.bad: dict[Any, Callable[[], None]] = {}
        self.read = sources.SOURCES["files"].documents

    def __call__(self, settings: Any, seed: int, epoch: int, cursor: Cursor | None) -> Iterator[Any]:
        for item in self.read(settings, seed, epoch, cursor):
            if threading.current_thread().name == NAME:  # not what is read for validation
                self.count += 1
                self.bad |= {item[0]: self.faults.pop(self.count)} if self.count in self.faults else {}
                if fault := self.bad.get(item[0]) if self.forever else self.bad.pop(item[0], None):
                    fault()
            yield item


def numbered(at: Cursor) -> Iterator[tuple[int, Cursor]]:
    for k in itertools.count(at["next"]):
        beat(f"number {k}")
        yield k, {"next": k + 1}


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


@pytest.mark.check(16)
def test_the_reader_dies_or_hangs_now_and_then(
    trials: Trials, tiny_settings: TinySettings, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is begun anew from the batch that was trained on last: the same batches in the same order as without."""
    from moelet.hparams import make_hparams

    text = f"{tiny_settings()['data']['files']}/rows.jsonl"
    settings = make_hparams(tiny_settings(data={"files": text, "shuffle_window": 4})).data
    read, count = sources.SOURCES["files"], 250
    released = threading.Event()

    def batches(cursor: Cursor) -> Iterator[tuple[data.Batch, Cursor]]:
        return data.training_batches(settings, tokenizer, 32, [4], 0, cursor)

    def plain(item: Any) -> Any:
        return item[0].input_ids.tolist(), item[0].labels.tolist(), item[1]

    expected = [plain(item) for item in itertools.islice(batches(data.START), count)]
    kinds = [*map(raising, ERRORS.values()), stuck(released)]
    names = [*ERRORS, "it hangs"]
    for index in range(trials.count(small=6, full=30)):
        draw = trials.random
        with trials.one(f"{names[index % len(names)]}, {index}"), monkeypatch.context() as patch:
            faults = {draw.randrange(3, 40): kinds[index % len(kinds)] for _ in range(draw.randrange(1, 3))}
            documents = Faults(faults)
            patch.setitem(sources.SOURCES, "files", read._replace(documents=documents))
            found, began = [], time.monotonic()
            with Reader(batches, data.START, 4, PATIENCE) as reader:
                if isinstance(ERRORS.get(names[index % len(names)]), SystemExit):
                    with pytest.raises(SystemExit):  # somebody wants the process to end
                        while True:
                            reader.wait(lambda: False)
                    continue
                while len(found) < count:
                    found.append(plain(reader.wait(lambda: False)))
            assert found == expected and not documents.faults
            assert time.monotonic() - began < 10
    released.set()


@pytest.mark.check(16)
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("kind", ["hangs", "dies", "has a bug"])
def test_a_reader_that_cannot_be_begun_anew(
    trials: Trials,
    kind: str,
    tiny_settings: TinySettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After three tries the run is saved and ends with 75, naming the reader and its place; a bug ends it as a bug."""
    tokenizer.save(tmp_path / "given.model")
    released, read = threading.Event(), sources.SOURCES["files"]
    faults = {"hangs": stuck(released), "dies": raising(MemoryError()), "has a bug": raising(AssertionError("never"))}
    text = f"{tiny_settings()['data']['files']}/rows.jsonl"
    settings = tiny_settings(
        tokenizer={"file": str(tmp_path / "given.model")},
        data={"files": text, "shuffle_window": 4, "reader_patience": PATIENCE},
        train={"train_steps": 40, "checkpoint_steps": 100, "eval_tokens": 50},
    )
    whole: list[Step] = []
    train_until(monkeypatch, tmp_path / "whole", settings, None, whole)
    for index in range(trials.count(small=1, full=5)):
        with trials.one(f"{kind}, {index}"), monkeypatch.context() as patch:
            caplog.clear()
            run, at = tmp_path / str(index), trials.random.randrange(5, 10)
            documents = Faults({at: faults[kind]}, forever=True)
            patch.setitem(sources.SOURCES, "files", read._replace(documents=documents))
            error = AssertionError if kind == "has a bug" else TemporaryError
            steps: list[Step] = []
            with pytest.raises(error) as caught:
                train_until(monkeypatch, run, settings, None, steps)
            made = steps[-1].number if steps else 0
            if error is TemporaryError:
                how = "got stuck, no sign of life for 0.3 s" if kind == "hangs" else "died of MemoryError"
                said = str(caught.value)
                assert f"the reader of the text (thread {NAME}) {how}; it was at {text}:" in said
                assert f"begun anew 3 times, to no avail. Saved at step {made}. Resume with: python -m moelet" in said
            assert [
                record.message.rpartition("(")[2] for record in caplog.records if "begun anew" in record.message
            ] == [f"{number} of 3)" for number in (1, 2, 3)]
            assert (newest(run).name == f"step-{made:08}") and made < 40
            patch.undo()
            train_until(monkeypatch, run, None, None, steps)
            assert steps == whole
            assert_same_run(run, tmp_path / "whole")
    released.set()


@pytest.mark.check(16)
def test_a_reader_that_is_slow_but_gets_on(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """It isn't taken for one that hangs, however long the next batch takes: a sign of life is enough."""
    monkeypatch.setattr(prefetch.LOG, "warning", lambda *given, **named: pytest.fail("begun anew"))

    def slow(at: Cursor) -> Iterator[tuple[int, Cursor]]:
        for _ in range(10):
            time.sleep(PATIENCE / 5)
            beat()
        yield from numbered(at)

    for index in range(trials.count(small=1, full=3)):
        with trials.one(str(index)), Reader(slow, {"next": 0}, 2, PATIENCE) as reader:
            assert reader.wait(lambda: False) == (0, {"next": 1})


@pytest.mark.check(16)
def test_a_thread_that_was_left_alone_wakes_up(trials: Trials) -> None:
    """It ends at its next sign of life; nothing of what it read is used."""
    for index in range(trials.count(small=2, full=10)):
        with trials.one(str(index)):
            released, begun = threading.Event(), []

            def late(at: Cursor, released: threading.Event = released, begun: list[int] = begun) -> Iterator[Any]:
                begun.append(at["next"])
                if len(begun) == 1:
                    yield from itertools.islice(numbered(at), 3)
                    released.wait(30)
                    yield 99, {"next": 0}
                    yield from numbered({"next": 99})
                yield from numbered(at)

            with Reader(late, {"next": 0}, 1, PATIENCE) as reader:
                found = [reader.wait(lambda: False) for _ in range(8)]
                assert found == [(k, {"next": k + 1}) for k in range(8)] and begun == [0, 3]
                assert len(readers()) == 2
                released.set()
                limit = time.monotonic() + 5
                while len(readers()) > 1 and time.monotonic() < limit:
                    time.sleep(0.01)
                assert len(readers()) == 1


@pytest.mark.check(16)
def test_mistakes_of_people_are_not_tried_again(trials: Trials) -> None:
    """What the text's source says to people, such as a missing field, ends the run at once."""
    for error in (UserError("row 3"), TemporaryError("away")):
        with trials.one(type(error).__name__):
            begun = []

            def broken(at: Cursor, error: Exception = error, begun: list[int] = begun) -> Iterator[tuple[int, Cursor]]:
                begun.append(at["next"])
                yield from itertools.islice(numbered(at), 2)
                raise error

            with Reader(broken, {"next": 0}, 2, PATIENCE) as reader, pytest.raises(type(error), match=str(error)):
                while True:
                    reader.wait(lambda: False)
            assert begun == [0]


@pytest.mark.check(16)
def test_the_process_is_stopped_and_goes_on(
    trials: Trials, tiny_settings: TinySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP stops the reading thread with the rest: after SIGCONT nothing is taken for stuck, and all is the same."""
    if not trials.full:  # starting processes takes long: what the reader sees of it is a clock that jumps
        with trials.one("a jump of the clock"), monkeypatch.context() as patch:
            jumps = itertools.count(1000.0, 1000.0)
            patch.setattr(prefetch, "monotonic", lambda: next(jumps))
            patch.setattr(prefetch.LOG, "warning", lambda *given, **named: pytest.fail("begun anew"))

            def slow(at: Cursor) -> Iterator[tuple[int, Cursor]]:
                time.sleep(PATIENCE)
                yield from numbered(at)

            reader = Reader(slow, {"next": 0}, 2, 3 * PATIENCE)
            reader._ahead.__enter__()
            assert reader.wait(lambda: False) == (0, {"next": 1})
            reader._ahead.abandon()
        return
    zygote = Zygote(tmp_path / "out.txt")
    try:
        settings = tiny_settings(data={"reader_patience": PATIENCE, "shuffle_window": 16}, train={"train_steps": 40})
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        zygote.run("train", tmp_path / "settings.json", "--run", tmp_path / "whole")
        for index in range(trials.count(small=1, full=6)):
            with trials.one(str(index)):
                run = tmp_path / str(index)
                pid = zygote.start("train", tmp_path / "settings.json", "--run", run)
                wait_for_step(run, trials.random.randrange(1, 35), pid)
                os.kill(pid, signal.SIGSTOP)
                time.sleep(3 * PATIENCE)
                os.kill(pid, signal.SIGCONT)
                assert zygote.wait() == 0
                assert "begun anew" not in zygote.said()
                assert_same_run(run, tmp_path / "whole")
    finally:
        zygote.process.kill()
        zygote.process.wait()
