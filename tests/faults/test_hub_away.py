"""A hub that fails in every way a hub can: rows come as if it hadn't, or the run ends saved and says how to go on."""

import re
import socket
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TinySettings
from cuts import Step, in_process, train_until  # noqa: F401  a fixture
from hub_client import forget_what_is_known, use_hub, without_sleeps
from hub_server import HubServer
from processes import assert_same_run, newest
from scorecard import Trials
from zyda import ZYDA, make_zyda, zyda_documents

from moelet.errors import TemporaryError
from moelet.sections import DataSettings
from moelet.text import hub
from moelet.text.documents import Cursor
from moelet.text.sources import SOURCES
from moelet.tokenizer import Tokenizer

SHARD = r"^GET .*sample/100BT.*\.parquet"
ROWS = 30  # read in a trial: of three row groups, or of all files at once
GIVEN = DataSettings(source="hub", dataset=ZYDA, name="sample-100BT")


def status(code: int, **headers: str) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"kind": "status", "code": code, "headers": named}


KINDS: dict[str, dict[str, Any]] = {
    "429 with Retry-After": status(429, Retry_After="3"),
    "429 without": status(429),
    **{str(code): status(code) for code in (500, 502, 503, 504)},
    "503 with a date": status(503, Retry_After="Thu, 01 Jan 2015 00:00:00 GMT"),
    "a reset": {"kind": "reset"},
    "a reset in the middle": {"kind": "drop"},
    "a body cut short": {"kind": "truncate"},
    "a wrong length": {"kind": "wrong_length"},
    "a login page with status 200": {"kind": "html"},
    "a stall": {"kind": "slow", "delay": 0.6},
    "no such host": {},
}
PLACES = (SHARD, SHARD, SHARD, "README", "revision", "tree")


class Sleeps(list[float]):
    """The place of `sleep`, ours and the client's: time passes at once, and is noted."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)

    def now(self) -> float:
        return sum(self)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    make_zyda(folder, zyda_documents(400), rows_per_group=20)
    return folder


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Sleeps:
    from huggingface_hub.utils import _http

    found = Sleeps()
    monkeypatch.setattr(hub, "sleep", found)
    monkeypatch.setattr(hub, "monotonic", found.now)
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(_http.time), "sleep": found}))
    return found


@pytest.fixture
def server(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeps: Sleeps) -> Iterator[HubServer]:
    from huggingface_hub import constants

    with HubServer(root) as found:
        use_hub(monkeypatch, found, tmp_path)
        without_sleeps(monkeypatch)
        for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
            monkeypatch.setattr(constants, name, 0.2)
        yield found


def plain(items: Any) -> list[Any]:
    return [(item.text, item.name, cursor) for item, cursor in items]


def read(cursor: Cursor | None = None) -> Iterator[Any]:
    return SOURCES["hub"].documents(GIVEN, 3, 0, cursor)


def lose_host(patch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Have the next so many look-ups of a name fail, on connections that are new; return what is left of them."""
    from huggingface_hub import close_session

    left, real = [times], socket.getaddrinfo

    def fail(*given: Any, **named: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real(*given, **named)

    close_session()
    patch.setattr(socket, "getaddrinfo", fail)
    return left


@pytest.mark.check(14)
def test_requests_that_fail(trials: Trials, server: HubServer, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried again, as late as the hub asks: from wherever it was, the same rows in the same order, none twice."""
    whole, draw = plain(read()), trials.random
    assert len(whole) == len({text for text, _, _ in whole}) == 400
    names, came = list(KINDS), 0
    for index in range(trials.count(small=14, full=500)):
        kind, place = names[index % len(names)], draw.choice(PLACES)
        at, times = draw.randrange(0, 400 - ROWS), draw.randrange(1, 9)
        with trials.one(f"{kind}, {times} times at {place}, row {at}"), monkeypatch.context() as patch:
            server.faults.clear()
            sleeps.clear()
            forget_what_is_known()
            if kind == "no such host":
                left = lose_host(patch, times)
            else:
                options = {"skip": draw.randrange(3) if place == SHARD else 0, "times": times, **KINDS[kind]}
                options["times"] = min(times, 2) if kind == "a stall" else times
                server.fail(place, **options)
                left = []
            found = plain(islice(read(whole[at - 1][2] if at else None), ROWS))
            assert found == whole[at : at + ROWS]
            fired = server.faults and server.faults[0].times < options["times"] if not left else left[0] < times
            if kind == "429 with Retry-After" and fired and place != "README":  # which the client has in its cache
                assert max(sleeps) >= 3.0
            assert sum(sleeps) <= hub.PATIENCE
            came += bool(fired)
            server.faults.clear()
    assert came > 0.9 * trials.tried, "most of them must come where something is asked for"


@pytest.mark.check(14)
@pytest.mark.usefixtures("in_process")
def test_a_hub_that_stays_away(
    trials: Trials,
    server: HubServer,
    sleeps: Sleeps,
    tiny_settings: TinySettings,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run says each minute that it waits; after 600 s it is saved and ends with 75 and the command that goes on,
    which ends as if nothing had been."""
    tokenizer.save(tmp_path / "given.model")
    data = {"source": "hub", "files": None, "dataset": ZYDA, "name": "sample-100BT", "shuffle_window": 16}
    settings = tiny_settings(
        tokenizer={"file": str(tmp_path / "given.model")},
        data=data,
        train={"train_steps": 60, "checkpoint_steps": 1000, "eval_tokens": 50},
    )
    whole: list[Step] = []
    forget_what_is_known()
    train_until(monkeypatch, tmp_path / "whole", settings, None, whole)
    asked = sum(bool(re.search(SHARD, f"{request.method} {request.path}")) for request in server.requests)
    assert asked > 12
    for index in range(trials.count(small=1, full=8)):
        with trials.one(str(index)):
            caplog.clear()
            run = tmp_path / str(index)
            skip = trials.random.randrange(asked // 2, asked - 2)  # requests, the first of which are for held-out text
            forget_what_is_known()
            server.fail(SHARD, times=float("inf"), skip=skip, **KINDS[("500", "a reset", "429 without")[index % 3]])
            steps: list[Step] = []
            with pytest.raises(TemporaryError) as caught:
                train_until(monkeypatch, run, settings, None, steps)
            said, made = str(caught.value), steps[-1].number if steps else 0
            assert "hub unreachable for 600 s" in said
            if steps:  # else it was away before the first one: nothing to save yet
                assert f"Saved at step {made}. Resume with: python -m moelet train --resume {run}" in said
                assert newest(run).name == f"step-{made:08}" and made < 60
            assert sum("can't be reached" in record.message for record in caplog.records) > 5
            assert sum("still waiting" in record.message for record in caplog.records) >= 1
            assert max(sleeps) <= hub.HEARTBEAT
            server.faults.clear()
            train_until(monkeypatch, run, None, None, steps)
            assert steps == whole
            assert_same_run(run, tmp_path / "whole")
