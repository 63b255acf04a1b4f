"""Requests that mean harm, or come from broken clients: refused in words or answered, and the server is as it was."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest
from conftest import TinySettings
from scorecard import Trials
from serving import SHAPES, Server, make_run, post, serving

from moelet.tokenizer import Tokenizer

PATIENCE = 25.0  # seconds; the server's own, with what it grants for a head (10) and a body (10), is shorter
GROWTH = 50 * 2**20  # bytes of memory that the server may have gained
GOOD = {"prompt": "def f(", "max_tokens": 12, "seed": 1}
Request = tuple[bytes, set[int]]  # what is sent, and the statuses it may have


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: TinySettings, tokenizer: Tokenizer
) -> Iterator[Server]:
    """One of its own: what it keeps and how fast it is depends on nobody else's requests."""
    pytest.importorskip("fastapi")
    folder = tmp_path_factory.mktemp("hostile")
    run = make_run(folder / "quick", tiny_settings, tokenizer, **SHAPES["quick"])
    with serving(folder, [run], "--max-tokens", "2000", "--max-seconds", "5", "--queue", "8") as opened:
        yield opened


def raw(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([line, *headers, "", ""]).encode("latin-1") + body


def fields(random: Random) -> Any:
    """Return a body with something in it that doesn't fit."""
    huge = "9" * random.choice([30, 400, 5000])
    return random.choice(
        [
            {"max_tokens": 10**9}, {"max_tokens": 1e9}, {"max_tokens": -1}, {"max_tokens": True}, {"max_tokens": []},
            {"temperature": -random.random() - 1e-9}, {"temperature": 1e308}, {"temperature": "0.5"},
            b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"top_p": -Infinity}', b'{"top_p": 1e999}',
            {"top_k": "50"}, {"top_k": 0}, {"top_k": 2.5}, {"top_p": 0}, {"top_p": 2}, {"n": 0}, {"n": 10_000},
            {"seed": 2**64}, f'{{"seed": {huge}}}'.encode(), f'{{"n": {huge}}}'.encode(), {"logprobs": 1000},
            {"stop": ""}, {"stop": ["x"] * 50}, {"stop": [None]}, {"stop": {"a": "b"}}, {"prompt": {"$ne": None}},
            {"prompt": [[]]}, {"prompt": ["x", 5]}, {"prompt": [-1]}, {"prompt": [2**70]}, {"prompt": ["x"] * 99},
            {"prompt": "\ud800" * random.randint(1, 9)}, {"model": "../../etc/passwd"}, {"model": "\x00\udfff"},
            {"model": ["quick"]}, {"stream": "yes"}, {"__class__": "x"}, {"logit_bias": {"5": 100}}, {"\ud800": 1},
            b"", b"null", b"[]", b"5", b'"x"', b"{", b'{"prompt": "x",}', b"\xff\xfe\x00{", b"\x00" * 100,
            b"[" * random.randint(1000, 60_000), b'{"a":' * random.randint(1000, 10_000), b"prompt=x&n=1",
        ]
    )  # fmt: skip


def bad_field(random: Random, port: int) -> Request:
    return post(fields(random), port), {400, 404}


def too_long(random: Random, port: int) -> Request:
    """A prompt beyond the context; a body beyond 64 KB; one of 10 MB."""
    size = random.choice([1000, 60_000, 70_000, 10 * 2**20])
    return post({"prompt": "word " * (size // 5)}, port), {413}


def other_host(random: Random, port: int) -> Request:
    names = ["evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "127.1", "2130706433", "0.0.0.0", "[::]",
             "localhost@evil.example", "", "localhost:localhost", "\xff", "169.254.169.254"]  # fmt: skip
    name = random.choice(names)
    return raw(f"GET {random.choice(['/', '/v1/models'])} HTTP/1.1", f"Host: {name}", "Connection: close"), {400, 403}


def no_host(random: Random, port: int) -> Request:
    line, headers = random.choice(
        [("GET / HTTP/1.0", []), ("GET / HTTP/1.1", []), ("GET / HTTP/1.1", ["Host: localhost", "Host: evil.example"])]
    )
    return raw(line, *headers), {400, 403}


def other_origin(random: Random, port: int) -> Request:
    origin = random.choice(["http://evil.example", "null", "https://localhost", f"http://127.0.0.1:{port + 1}", "x"])
    return post(GOOD, port, Origin=origin), {403}


def preflight(random: Random, port: int) -> Request:
    headers = (f"Host: 127.0.0.1:{port}", "Origin: http://evil.example", "Access-Control-Request-Method: POST")
    return raw("OPTIONS /v1/completions HTTP/1.1", *headers, "Connection: close"), {403}


def other_kind(random: Random, port: int) -> Request:
    kind = random.choice(["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
    return post(GOOD, port, Content_Type=kind), {415}


def other_method(random: Random, port: int) -> Request:
    line = random.choice(
        ["GET /v1/completions?q=<script>", "GET /v1/completions?prompt=x", "PUT /", "DELETE /v1/models", "TRACE /"]
    )
    return raw(f"{line} HTTP/1.1", f"Host: localhost:{port}", "Connection: close"), {400, 405}


def other_path(random: Random, port: int) -> Request:
    path = random.choice(
        ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page.js/../../hparams.json", "/..%2f..%2fhparams.json",
         "/page.css%00.html", "//etc/passwd", "/static/../server.py", "/v1/models/..%2f..%2fx", "/%ff%fe",
         "/docs", "/openapi.json", "/v1/models/%3Cimg%20src=x%20onerror=alert(1)%3E", "/page.css/", "/hparams.json",
         "/" + "a" * 9000]
    )  # fmt: skip
    return raw(f"GET {path} HTTP/1.1", f"Host: localhost:{port}", "Connection: close"), {400, 404}


def no_http(random: Random, port: int) -> Request:
    junk = random.choice(
        [random.randbytes(200) + b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(99),
         b"GET / HTTP/9.9\r\n\r\n", b"GET  /  HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nHost localhost\r\n\r\n",
         raw("GET / HTTP/1.1", f"Host: localhost:{port}", "X: " + "a" * 200_000),
         raw("POST /v1/completions HTTP/1.1", f"Host: localhost:{port}", "Content-Length: -5"),
         raw("POST /v1/completions HTTP/1.1", f"Host: localhost:{port}", "Content-Length: 5", "Content-Length: 6"),
         raw("POST /v1/completions HTTP/1.1", f"Host: localhost:{port}", "Transfer-Encoding: chunked, identity"),
         raw("POST /v1/completions HTTP/1.1", f"Host: localhost:{port}", "Content-Type: application/json",
             "Transfer-Encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n")]
    )  # fmt: skip
    return junk, {400, 403, 501}


def short_length(random: Random, port: int) -> Request:
    """A Content-Length below the body: the body is cut, and what follows is no request."""
    return post(GOOD, port, Content_Length=str(random.randint(1, 20))), {400}


def upgrade(random: Random, port: int) -> Request:
    headers = (f"Host: localhost:{port}", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: x")
    return raw("GET /v1/models HTTP/1.1", *headers, "Sec-WebSocket-Version: 13"), {200, 400, 403}


KINDS = [bad_field, bad_field, bad_field, too_long, other_host, no_host, other_origin, preflight, other_kind,
         other_method, other_path, no_http, short_length, upgrade]  # fmt: skip


def send(server: Server, data: bytes) -> bytes:
    """Return what the server answers first; a client that is cut off while it still sends reads what there is."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        try:
            connection.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while b"\r\n\r\n" not in answer and (part := connection.recv(65536)):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def refused(server: Server, make: Callable[[Random, int], Request], seed: int) -> None:
    """Send one, and see that the answer is one of those that it may have, and lets no other page read it."""
    data, statuses = make(Random(seed), server.port)
    answer = send(server, data)
    assert answer.startswith(b"HTTP/1."), f"no answer to {data[:200]!r}"
    assert int(answer[9:12]) in statuses, f"{answer[:400]!r} to {data[:200]!r}"
    assert b"access-control-allow" not in answer.lower() and b"Traceback" not in answer


def slowly(server: Server, seed: int) -> None:
    """Begin a head, or a body, and leave it: the server's patience ends before the client's. With a short patience,
    tests/test_serve.py does so too.
    """
    random = Random(seed)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
    body = f"{head}Content-Type: application/json\r\nContent-Length: 60\r\n\r\n{{"
    with server.open(random.choice([b"", b"G", head.encode(), body.encode()])) as connection:
        connection.settimeout(PATIENCE)
        answer = connection.recv(4096)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408"), answer


def goes_away(server: Server, seed: int) -> None:
    """Ask for a long text, and go: at once, in the middle of the request, or of the answer."""
    random = Random(seed)
    data = post({"prompt": "x", "max_tokens": 2000, "stream": random.random() < 0.7, "n": 2}, server.port)
    with server.open(data[: random.choice([20, 150, len(data), len(data)])]) as connection:
        connection.settimeout(random.choice([0.01, 0.05, 0.3]))
        try:
            connection.recv(random.choice([1, 2000]))
        except TimeoutError:
            pass


def streams(server: Server, n: int) -> list[int]:
    """Return the statuses of n streams at once, each read to its end."""

    def one(seed: int) -> int:
        asked = {"prompt": "x", "max_tokens": 20, "stream": True, "seed": seed}
        with server.open(post(asked, server.port, Connection="close")) as connection:
            connection.settimeout(60)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        status = int(answer[9:12])
        assert (status == 200) == (b"data: [DONE]" in answer)
        return status

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


def seconds_of_a_good_one(server: Server) -> float:
    """Return the least of fifteen: what this machine does besides only makes it longer."""
    times = []
    for _ in range(15):
        began = time.perf_counter()
        server.complete(**GOOD)
        times.append(time.perf_counter() - began)
    return min(times)


@pytest.mark.check(32)
def test_hostile_requests(trials: Trials, server: Server) -> None:
    """None gets a 5xx or a traceback; afterwards memory, speed and answers are those from before."""
    want = server.complete(**GOOD)["text"]
    streams(server, 24)  # as much as the server does at a time: what it keeps for that is no leak
    before, memory = seconds_of_a_good_one(server), server.memory()

    def attack(index: int) -> None:
        make = KINDS[index % len(KINDS)]
        refused(server, make, index)

    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(slowly, server, index) for index in range(trials.count(small=0, full=40))]
        for start in range(0, trials.count(small=98, full=840), 7):
            tries = [pool.submit(attack, index) for index in range(start, start + 7)]
            for index, attempt in enumerate(tries, start):
                with trials.one(f"{KINDS[index % len(KINDS)].__name__} {index}"):
                    attempt.result()
        for index in range(trials.count(small=6, full=70)):
            with trials.one(f"goes away {index}"):
                goes_away(server, index)
        for index, attempt in enumerate(slow):
            with trials.one(f"slow {index}"):
                attempt.result()
    with trials.one("all that went away freed their places"):
        until = time.monotonic() + 5
        while server.busy() != (0, 0):
            assert time.monotonic() < until, server.busy()
            time.sleep(0.05)
    for status in streams(server, 50):
        with trials.one("one of 50 streams"):
            assert status in (200, 429)
    with trials.one("the answers are the same"):
        assert server.complete(**GOOD)["text"] == want
    with trials.one("nothing leaked"):
        grown = server.memory() - memory
        print(f"memory grew by {grown / 2**20:.1f} MiB")
        assert grown < GROWTH, f"{grown / 2**20:.0f} MiB more"
    with trials.one("a good request takes no longer"):
        after = seconds_of_a_good_one(server)
        print(f"a good request took {1000 * before:.0f} ms, and {1000 * after:.0f} ms afterwards")
        assert after < 2 * before or (not trials.full and after < 0.5), f"{before:.3f} s, then {after:.3f} s"
    with trials.one("the log is empty: no traceback, no complaint"):
        assert server.process.poll() is None and server.log.read_text() == ""


def test_a_listed_refusal_is_json(server: Server) -> None:
    """Errors of all kinds have OpenAI's form, with the headers of a page that nobody may embed."""
    for data, _ in (kind(Random(1), server.port) for kind in (bad_field, other_host, other_kind, other_path)):
        with server.open(data) as connection:
            answer = b""
            while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
                answer += connection.recv(65536)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert json.loads(body)["error"]["message"]
        for name in (b"content-security-policy: default-src 'none'", b"nosniff", b"x-frame-options: DENY"):
            assert name in head
