"""The hub that tests talk to: the real client takes it for one, and it fails as scripted."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import hub_environment, use_hub, without_sleeps
from hub_server import HubServer
from zyda import COMPONENTS, ZYDA, make_zyda, zyda_documents

datasets = pytest.importorskip("datasets")

DOCUMENTS = zyda_documents(60)
SHARD = r"GET .*fwe3/part_00001\.parquet"
WEATHER: dict[str, dict[str, Any]] = {  # faults after which a stream goes on
    "status": {"code": 503},
    "reset": {},
    "drop": {"after": 2000},
    "truncate": {},
    "slow": {"delay": 0.4},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    make_zyda(tmp_path, DOCUMENTS, rows_per_group=4)
    with HubServer(tmp_path) as hub:
        use_hub(monkeypatch, hub, tmp_path / "home")
        without_sleeps(monkeypatch)
        yield hub


def stream(name: str = "sample-100BT", split: str = "train", **options: Any) -> Any:
    return datasets.load_dataset(ZYDA, name=name, split=split, streaming=True, **options)


def refuses(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    with pytest.raises(HfHubHTTPError) as caught:
        call(*arguments, **options)
    return type(caught.value).__name__


def test_the_client_streams_zyda(hub: HubServer) -> None:
    rows = stream()
    assert rows.column_names == ["nemo_id", "text"]
    found = {row["nemo_id"]: row["text"] for row in rows}
    count = {component: len(texts) for component, texts in DOCUMENTS.items()}
    assert list(found) == [f"{component}-{row:07d}" for component in COMPONENTS for row in range(count[component])]
    assert list(found.values()) == [text for texts in DOCUMENTS.values() for text in texts]
    assert {request.status for request in hub.requests} <= {200, 206, 404}
    parts = {request.path for request in hub.requests if request.range and request.status == 206 and request.sent}
    assert len(parts) == 2 * len(COMPONENTS)


def test_configs_and_splits_are_their_own(hub: HubServer) -> None:
    assert [row["nemo_id"] for row in stream("fwe3")] == ["data-fwe3"]
    assert [row["nemo_id"] for row in stream("default")] == [f"data-{component}" for component in COMPONENTS]
    with pytest.raises(ValueError, match="Bad split"):
        stream(split="test")
    with pytest.raises(ValueError, match="BuilderConfig"):
        stream("sample-1T")


@pytest.mark.parametrize("kind", WEATHER)
def test_the_client_weathers(hub: HubServer, kind: Any) -> None:
    fault, started = hub.fail(SHARD, kind, **WEATHER[kind]), time.monotonic()
    assert hub.faults_left() == [fault]
    assert len(list(stream())) == 60
    assert time.monotonic() - started >= fault.delay
    assert hub.faults_left() == []
    asked = [request.fault for request in hub.requests if "fwe3/part_00001" in request.path]
    assert asked == ([kind] if kind == "slow" else [kind, None])


@pytest.mark.parametrize("kind", ["html", "wrong_length"])
def test_the_client_does_not_weather(hub: HubServer, kind: Any) -> None:
    hub.fail(SHARD, kind)
    with pytest.raises(ValueError, match="Parquet"):
        list(stream())
    assert hub.faults_left() == [] and hub.requests[-1].fault == kind


def test_faults_are_counted_and_can_wait(hub: HubServer) -> None:
    from huggingface_hub import get_session

    url = f"{hub.url}/datasets/{ZYDA}/resolve/main/README.md"
    hub.fail("README", "status", times=2, skip=1, code=429, headers={"Retry-After": "7"})
    answers = [get_session().get(url) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 429, 429, 200]
    assert answers[1].headers["retry-after"] == "7"
    hub.clear()
    assert hub.requests == []


@pytest.mark.parametrize(("kind", "error"), [("reset", "Read"), ("drop", "Read"), ("truncate", "RemoteProtocol")])
def test_connections_end_as_scripted(hub: HubServer, kind: Any, error: str) -> None:
    import httpx2

    hub.fail("README", kind, after=7)
    with pytest.raises(getattr(httpx2, f"{error}Error")):
        httpx2.get(f"{hub.url}/datasets/{ZYDA}/resolve/main/README.md")
    assert [(request.sent, request.fault) for request in hub.requests] == [(0 if kind == "reset" else 7, kind)]


def test_parts_of_a_file(hub: HubServer) -> None:
    from huggingface_hub import get_session

    url, whole = f"{hub.url}/datasets/{ZYDA}/resolve/main/README.md", (hub.root / ZYDA / "README.md").read_bytes()
    for span, expected in {"5-9": whole[5:10], "5-": whole[5:], "5-99999": whole[5:], "0-0": whole[:1]}.items():
        answer = get_session().get(url, headers={"Range": f"bytes={span}"})
        assert (answer.status_code, answer.content) == (206, expected)
    assert get_session().get(url, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416
    head = get_session().head(url)
    assert (head.content, int(head.headers["content-length"])) == (b"", len(whole))
    assert head.headers["x-repo-commit"] == hub.commit(ZYDA).sha


def test_listings_come_in_pages(hub: HubServer) -> None:
    from huggingface_hub import HfApi

    hub.page_size = 5
    found = [entry.path for entry in HfApi().list_repo_tree(ZYDA, repo_type="dataset", recursive=True)]
    assert sorted(found) == sorted(
        path.relative_to(hub.root / ZYDA).as_posix() for path in (hub.root / ZYDA).rglob("*")
    )
    assert len(hub.requests) == -(-len(found) // 5)
    assert len(list(stream())) == 60


def test_an_old_commit_stays_what_it_was(hub: HubServer) -> None:
    from huggingface_hub import HfApi

    old = HfApi().dataset_info(ZYDA).sha
    assert old == HfApi().dataset_info(ZYDA).sha
    make_zyda(hub.root, {"fwe3": ["new", "newer", "newest"]})
    new = HfApi().dataset_info(ZYDA).sha
    assert old != new == hub.commit(ZYDA).sha
    assert [row["text"] for row in stream() if row["nemo_id"].startswith("fwe3")] == ["new", "newer", "newest"]
    assert [row["text"] for row in stream(revision=old) if row["nemo_id"].startswith("fwe3")] == DOCUMENTS["fwe3"]


def test_what_is_not_there_is_refused_as_by_the_hub(hub: HubServer) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    assert refuses(HfApi().dataset_info, "no/such") == "RepositoryNotFoundError"
    assert hub.requests[-1].status == 401
    assert refuses(HfApi().dataset_info, ZYDA, revision="v9") == "RevisionNotFoundError"
    assert hub.requests[-1].status == 404
    assert refuses(hf_hub_download, ZYDA, "absent.txt", repo_type="dataset") == "RemoteEntryNotFoundError"
    (info,) = HfApi().get_paths_info(ZYDA, ["README.md", "absent"], repo_type="dataset")
    assert info.size == (hub.root / ZYDA / "README.md").stat().st_size


def test_one_hub_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import HfFileSystem, constants

    before = constants.ENDPOINT, datasets.config.HF_ENDPOINT
    port = 0
    for files, text in enumerate(("first", "second", "third"), 1):
        make_zyda(tmp_path / text, {"fwe3": [text] * files}, files)
        with HubServer(tmp_path / text, port) as hub, monkeypatch.context() as patch:
            port = hub.port  # the same again: nothing may remember the hub before
            use_hub(patch, hub, tmp_path / text / "home")
            assert [row["text"] for row in stream()] == [text] * files
            assert len(HfFileSystem().ls(f"datasets/{ZYDA}/sample/100BT/fwe3")) == files
    assert before == (constants.ENDPOINT, datasets.config.HF_ENDPOINT)


def test_a_stopped_hub_answers_nobody(tmp_path: Path) -> None:
    import httpx2

    with httpx2.Client() as client:
        with HubServer(tmp_path) as hub:
            assert client.get(f"{hub.url}/api/datasets/no/such").status_code == 401
        with pytest.raises(httpx2.TransportError):
            client.get(f"{hub.url}/api/datasets/no/such")


def test_a_child_process_finds_the_hub(hub: HubServer, tmp_path: Path) -> None:
    program = f"from huggingface_hub import HfApi; print(HfApi().dataset_info({ZYDA!r}).sha)"
    environment = os.environ | hub_environment(hub, tmp_path / "child")
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [hub.commit(ZYDA).sha]


def test_documents_are_made_again() -> None:
    documents = zyda_documents(500, seed=3)
    texts = [text for component in documents.values() for text in component]
    assert documents == zyda_documents(500, seed=3) != zyda_documents(500, seed=4)
    assert len(set(texts)) == 500 and len({len(text) for text in texts}) > 100
