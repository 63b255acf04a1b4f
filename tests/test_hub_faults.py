"""The hub source against a hub on 127.0.0.1: the same rows whatever the connection does, and a run that survives it."""

import errno
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import TinySettings
from hub_client import forget_what_is_known, hub_environment, use_hub, without_sleeps
from hub_server import HubServer
from processes import Zygote, assert_same_run, kill_and_resume, last_step, rows
from zyda import COMPONENTS, ZYDA, make_zyda, zyda_documents

from moelet.data import START, training_rows
from moelet.errors import TemporaryError, UserError
from moelet.hparams import make_hparams
from moelet.sections import DataSettings
from moelet.text import hub
from moelet.text.documents import Cursor, Document
from moelet.text.sources import SOURCES
from moelet.tokenizer import Tokenizer
from moelet.train import pinned, with_commits_of

SAMPLE = "sample-100BT"
COUNT = 4000  # rows of 32 tokens; a pass over the mix has about 3000
SHARD = r"^GET .*sample/100BT.*\.parquet"


def settings(**changes: Any) -> DataSettings:
    return DataSettings(**({"source": "hub", "dataset": ZYDA, "name": SAMPLE} | changes))


def read(given: DataSettings, cursor: Cursor | None = None) -> Iterator[tuple[Any, Cursor]]:
    return SOURCES["hub"].documents(given, 3, 0, cursor)


def plain(items: Iterator[tuple[Any, Cursor]]) -> list[Any]:
    return [(item.text, item.name, cursor) for item, cursor in items]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents in two files a component, of row groups of 20 rows."""
    folder = tmp_path_factory.mktemp("hub")
    make_zyda(folder, zyda_documents(400), rows_per_group=20)
    return folder


@pytest.fixture
def server(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, and nothing in this process that sleeps for long."""
    monkeypatch.setattr(hub, "FIRST_PAUSE", 0.001)
    with HubServer(root) as found:
        use_hub(monkeypatch, found, tmp_path)
        without_sleeps(monkeypatch)
        yield found


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """A pass without faults."""
    with pytest.MonkeyPatch.context() as patch, HubServer(root) as found:
        use_hub(patch, found, tmp_path_factory.mktemp("home"))
        return plain(read(settings()))


def test_every_document_comes_once_and_the_components_are_mixed(server: HubServer, whole: list[Any]) -> None:
    expected = sorted(text for texts in zyda_documents(400).values() for text in texts)
    assert sorted(text for text, _, _ in whole) == expected
    places = [re.search(r"100BT/([^/]+)/(\w+)\.parquet:(\d+)", name) for _, name, _ in whole]
    first = Counter(place[1] for place in islice(places, 40) if place)
    assert set(first) == set(COMPONENTS) and max(first.values()) <= 12
    assert len({(place[1], place[2], place[3]) for place in places if place}) == 400


def test_it_goes_on_from_any_cursor(server: HubServer, whole: list[Any]) -> None:
    draw = random.Random(0)
    for k in [0, 1, 2, 397, 398, 399, *draw.sample(range(400), 12)]:
        cursor = json.loads(json.dumps(whole[k][2]))
        assert plain(read(settings(), cursor)) == whole[k + 1 :]


def test_a_resume_far_into_a_shard_reads_its_row_group_and_nothing_before(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Document 80,000 of 100,000, in seconds: what is fetched is the footer and what comes after."""
    big = tmp_path / "big"
    make_zyda(big, {COMPONENTS[0]: [f"{k} " + "abc " * 40 for k in range(100_000)]}, 1, rows_per_group=1000)
    with HubServer(big) as found:
        use_hub(monkeypatch, found, tmp_path / "home")
        shard = next((big / ZYDA).glob("sample/100BT/*/*.parquet")).stat().st_size
        cursor = {"lanes": [[0, 79, 79_999]], "turn": 0, "next": 1}
        began = time.monotonic()
        item, after = next(read(settings(), cursor))
        assert time.monotonic() - began < 20
        assert item.text.startswith("79999 ") and after["lanes"] == [[0, 80, 80_000]]
        reads = [request for request in found.requests if "sample/100BT" in request.path and request.range]
        starts = [int(re.findall(r"\d+", str(request.range))[0]) for request in reads]
        assert starts and min(starts) > 0.75 * shard, "nothing before row group 79 is read"


LOADING = [("README", "status"), ("README", "reset"), ("revision", "status"), ("revision", "reset"), ("tree", "html")]


@pytest.mark.parametrize(("place", "kind"), LOADING, ids=["-".join(fault) for fault in LOADING])
def test_faults_while_loading_are_waited_out(server: HubServer, whole: list[Any], place: str, kind: Any) -> None:
    server.fail(place, kind)
    assert plain(islice(read(settings()), 30)) == whole[:30]
    assert not server.faults_left()


@pytest.mark.parametrize("body", [[], {}, "x", None, 5, [1]], ids=json.dumps)
def test_json_of_the_wrong_kind_is_waited_out(server: HubServer, whole: list[Any], body: Any) -> None:
    """From whoever stands between us and the hub."""
    for place in ("revision", "tree") if body not in ([], {}) else ("revision",):  # a folder may be empty
        server.fail(place, "json", body=body)
        forget_what_is_known()
        assert plain(islice(read(settings()), 30)) == whole[:30]
        assert not server.faults_left()


def test_a_mistake_of_our_own_is_not_waited_out(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_require_field", lambda fields, settings: fields["field"])
    with pytest.raises(TypeError):
        next(read(settings()))


READING = ["status", "reset", "drop", "truncate", "wrong_length", "html"]


@pytest.mark.parametrize("kind", READING)
def test_faults_while_reading_change_no_row(server: HubServer, whole: list[Any], kind: Any) -> None:
    """Often enough that the client's own tries are used up, in the middle of the pass."""
    server.fail(SHARD, kind, times=9, skip=7)
    assert plain(read(settings())) == whole
    assert not server.faults_left()


def test_it_waits_as_long_as_the_hub_asks(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(hub, "sleep", pauses.append)
    server.fail("revision", "status", code=429, headers={"Retry-After": "7"}, times=2)
    server.fail("revision", "status", code=503, headers={"Retry-After": "Thu, 01 Jan 2015 00:00:00 GMT"})
    server.fail("revision", "reset")
    SOURCES["hub"].pin(settings(revision="main"))
    assert pauses[:2] == [7.0, 7.0] and max(pauses[2:]) < 0.1 and len(pauses) == 4
    assert "can't be reached" in caplog.text and "again in 7.0 s" in caplog.text


def test_patience_ends_in_a_temporary_error_that_loses_nothing(
    server: HubServer, whole: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    before: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(hub, "monotonic", lambda: clock[0])
        patch.setattr(hub, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
        patch.setattr(hub, "FIRST_PAUSE", 1.0)
        server.fail(SHARD, "status", times=float("inf"), skip=8)
        with pytest.raises(TemporaryError, match=r"hub unreachable for 600 s .*Zyphra/Zyda-2.*Nothing is lost"):
            for item, cursor in read(settings()):
                before.append((item.text, item.name, cursor))
    assert len(before) > 2
    assert clock[0] == pytest.approx(hub.PATIENCE)
    server.faults.clear()
    assert before + plain(read(settings(), before[-1][2])) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "no-one/nothing"}, r"no-one/nothing.*Set data\.dataset"),
        ({"revision": "v9"}, r"v9.*Set data\.revision"),
        ({"name": "sample-1BT"}, r"sample-1BT.*Set data\.name"),
        ({"split": "test"}, r"test.*Set data\.split"),
        ({"text_field": "body"}, r"no field 'body'.*'nemo_id', 'text'"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_mistakes_are_explained_at_once(
    server: HubServer, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "sleep", lambda seconds: pytest.fail("nothing to wait for"))
    with pytest.raises(UserError, match=message):
        next(read(settings(**changes)))
    if "revision" in changes or "dataset" in changes:
        with pytest.raises(UserError, match=message):
            SOURCES["hub"].pin(settings(**changes))


def test_a_full_disk_of_ours_is_not_waited_for(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "sleep", lambda seconds: pytest.fail("nothing to wait for"))
    monkeypatch.setattr("datasets.load_dataset_builder", full)
    with pytest.raises(OSError, match="No space left"):
        next(read(settings()))


@pytest.mark.parametrize("code", [401, 403])
def test_a_closed_dataset_is_explained(server: HubServer, code: int) -> None:
    server.fail("api/datasets", "status", code=code, times=float("inf"))
    with pytest.raises(UserError, match=r"(refuses access|or it is private).*hf auth login"):
        SOURCES["hub"].pin(settings())


def test_a_run_stays_at_the_commit_it_began_with(server: HubServer, root: Path, whole: list[Any]) -> None:
    pinned = SOURCES["hub"].pin(settings())
    assert hub.COMMIT.fullmatch(pinned.revision)
    server.clear()
    assert SOURCES["hub"].pin(pinned) == pinned and not server.requests, "once is enough"
    assert SOURCES["hub"].fingerprint(pinned) != SOURCES["hub"].fingerprint(settings())
    extra = root / ZYDA / "sample/100BT/fwe3/part_00009.parquet"
    extra.write_bytes((root / ZYDA / "sample/100BT/fwe3/part_00000.parquet").read_bytes())
    try:
        assert SOURCES["hub"].pin(settings()).revision != pinned.revision
        assert [text for text, _, _ in plain(read(pinned))] == [text for text, _, _ in whole]
        assert len(plain(read(settings()))) == 450
    finally:
        extra.unlink()


def test_settings_without_a_revision_go_on_at_the_commit_of_the_run(server: HubServer, root: Path) -> None:
    """What `FILE --resume DIR` reads again says nothing of a commit; the run does."""
    given = make_hparams({"data": mixed(root), "train": {"train_steps": 1}})
    began = pinned(given)
    assert began.data.mix is not None and began.data.mix[0].revision
    old = began.data.mix[0].model_copy(update={"revision": "0" * 40})
    saved = began.model_copy(update={"data": began.data.model_copy(update={"mix": [old, began.data.mix[1]]})})
    kept = with_commits_of(saved, given).data.mix
    assert kept is not None and kept[0].revision == "0" * 40
    other = given.data.parts[0].model_copy(update={"name": "fwe3"})
    changed = given.model_copy(update={"data": given.data.model_copy(update={"mix": [other, given.data.parts[1]]})})
    assert with_commits_of(saved, changed).data.parts[0].revision is None, "another configuration is another text"


# training


def mixed(root: Path) -> dict[str, Any]:
    """Data settings of a streamed, mixed, shuffled, packed run."""
    books = root / "books.jsonl"
    texts = [f"Leaf {k}: " + "a book has many leaves, and the tree none in winter. " * (k % 5 + 1) for k in range(90)]
    books.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = [
        {"source": "hub", "dataset": ZYDA, "name": SAMPLE, "weight": 3.0},
        {"source": "files", "files": str(books), "weight": 1.0},
    ]
    return {"source": "mix", "files": None, "mix": sources, "shuffle_window": 48, "mask_documents": True}


def test_the_order_of_documents_is_the_same_whatever_was_cut(
    server: HubServer, root: Path, tokenizer: Tokenizer, whole: list[Any]
) -> None:
    """Rows of tokens, and so the documents in them, with the stream cut at random places and faults in between."""
    given = DataSettings(**mixed(root))

    def stream(at: Cursor, count: int) -> list[tuple[list[int], Cursor]]:
        found = islice(training_rows(given, tokenizer, 32, 5, at), count)
        return [(row.tolist(), json.loads(json.dumps(cursor))) for row, cursor in found]

    expected = stream(START, COUNT)
    assert expected[-1][1]["epoch"] > 0, "all documents, and some of them again"
    draw, got, at = random.Random(2), [], START
    while len(got) < COUNT:
        for kind in ("status", "drop", "html"):
            server.fail(SHARD, kind, times=draw.randint(1, 8), skip=draw.randint(0, 9))
        got += stream(at, min(draw.randint(1, 400), COUNT - len(got)))
        at = got[-1][1]
    assert got == expected


@pytest.fixture(scope="module")
def far_zygote(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Zygote, HubServer]]:
    """Processes that know no other hub than this."""
    folder = tmp_path_factory.mktemp("zygote")
    with HubServer(root) as server:
        zygote = Zygote(folder / "out.txt", hub_environment(server, folder))
        yield zygote, server
        zygote.process.kill()
        zygote.process.wait()


def test_killed_five_times_while_the_hub_fails_the_run_ends_as_if_nothing_had_happened(
    far_zygote: tuple[Zygote, HubServer], root: Path, tiny_settings: TinySettings, tmp_path: Path
) -> None:
    zygote, server = far_zygote
    given = tiny_settings(data=mixed(root), train={"train_steps": 60, "checkpoint_steps": 5})
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(given))
    zygote.run("train", path, "--run", tmp_path / "whole")
    draw = random.Random(4)
    server.fail(SHARD, "drop", skip=3)
    server.fail(SHARD, "status", code=429, headers={"Retry-After": "1"}, skip=9)
    server.fail(SHARD, "status", code=500, skip=15)
    server.fail("tree", "reset", skip=2)
    kill_and_resume(zygote, path, tmp_path / "run", sorted(draw.sample(range(1, 50), 5)), 5, draw)
    assert not server.faults_left()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    shares = rows(tmp_path / "run")[-1]["mix"]
    assert [share["source"] for share in shares] == [ZYDA, str(root / "books.jsonl")]
    assert abs(shares[0]["documents"] - 0.75) < 0.02
    pinned = json.loads((tmp_path / "run" / "hparams.json").read_text())["data"]["mix"][0]["revision"]
    assert hub.COMMIT.fullmatch(pinned)


def test_a_hub_that_goes_away_loses_nothing(
    far_zygote: tuple[Zygote, HubServer], root: Path, tiny_settings: TinySettings, tmp_path: Path
) -> None:
    """In the middle it fails, and a signal finds the run waiting; then it refuses; then all is well again."""
    zygote, server = far_zygote
    data = {"source": "hub", "files": None, "dataset": ZYDA, "name": SAMPLE, "shuffle_window": 16}
    given = tiny_settings(data=data, train={"train_steps": 200, "batch_size": 16, "checkpoint_steps": 1000})
    (tmp_path / "settings.json").write_text(json.dumps(given))
    zygote.run("train", tmp_path / "settings.json", "--run", tmp_path / "whole")
    run = tmp_path / "run"
    pid = zygote.start("train", tmp_path / "settings.json", "--run", run)
    while not rows(run):
        time.sleep(0.005)
    server.fail(SHARD, "status", code=500, times=float("inf"))
    reached = -1
    while last_step(run) != reached:  # until it waits, where the second pass over the text begins
        reached = last_step(run)
        time.sleep(1.0)
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert zygote.wait() == 128 + signal.SIGTERM, zygote.said()
    assert time.monotonic() - began < 10
    assert 50 < reached < 200 and f"interrupted and saved at step {reached}" in zygote.said()
    server.faults.clear()
    server.fail(SHARD, "status", code=403, times=float("inf"), skip=20)
    zygote.start("train", "--resume", run)
    assert zygote.wait() == 78
    assert "refuses access" in zygote.said() and "Traceback" not in zygote.said()
    server.faults.clear()
    zygote.run("train", "--resume", run)
    assert "resumed at step" in zygote.said()
    assert_same_run(run, tmp_path / "whole")


def test_documents_of_the_hub_have_a_name_that_says_where_they_stand(server: HubServer) -> None:
    item, _ = next(read(settings()))
    assert isinstance(item, Document)
    assert re.fullmatch(rf"hf://datasets/{ZYDA}@[0-9a-f]{{40}}/sample/100BT/[\w-]+/part_0000\d\.parquet:1", item.name)
