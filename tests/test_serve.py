"""`moelet serve`: what the real client gets is what the model writes; what doesn't fit is refused in words."""

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings
from serving import Server, make_run, post, serving

from moelet import errors
from moelet.cli import main
from moelet.errors import UserError
from moelet.generate import Sampling, complete, continuations
from moelet.inspection.routing import mixtures, watched
from moelet.serve import app, server
from moelet.serve.app import read_body
from moelet.serve.engine import Engine, Order
from moelet.serve.guard import Rules, refuse
from moelet.serve.limits import Limits, Refusal
from moelet.serve.server import Door, bind, rules_for, serve
from moelet.serve.writing import Letter, Part, Reader, Token, Unfolding, Wish, Writing
from moelet.storage.checkpoint import Loaded, load
from moelet.tokenizer import Tokenizer

openai = pytest.importorskip("openai")
NAMES = ["quick", "plain"]


@pytest.fixture
def client(served: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def loaded(served: Server, name: str) -> Loaded:
    return load(served.runs[NAMES.index(name)])


@pytest.mark.parametrize("name", NAMES)
def test_the_client_streams_what_generate_writes(served: Server, client: Any, name: str) -> None:
    model, tokenizer, _, _ = loaded(served, name)
    fields = {"model": name, "prompt": "def main(", "max_tokens": 100, "temperature": 0.8, "seed": 5}
    stream = client.completions.create(**fields, stream=True, extra_body={"top_k": 50})
    chunks = [chunk.choices[0] for chunk in stream]
    [want] = complete(model, tokenizer, ["def main("], 100, Sampling(0.8, 50, None, 5))  # past the context
    assert "".join(chunk.text for chunk in chunks) == want
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert len(chunks) > 1 and chunks[-1].finish_reason in ("length", "stop")
    whole = client.completions.create(**fields, extra_body={"top_k": 50})
    assert whole.choices[0].text == want and whole.model == name
    read = 1 + len(tokenizer.encode("def main("))
    assert whole.usage.prompt_tokens == read and 0 < whole.usage.completion_tokens <= 100


def test_models_are_listed(served: Server, client: Any) -> None:
    assert [model.id for model in client.models.list()] == NAMES
    assert client.models.retrieve("plain").id == "plain"
    shape = served.ask("/v1/models/quick")[1]["moelet"]
    assert {key: shape[key] for key in ("n_layers", "n_experts", "top_k", "context", "step")} == {
        "n_layers": 2, "n_experts": 4, "top_k": 2, "context": 64, "step": 3,
    }  # fmt: skip
    with pytest.raises(openai.NotFoundError, match="There are: quick, plain"):
        client.completions.create(model="gpt", prompt="x")


def test_fifty_at_once_none_lost(client: Any) -> None:
    def ask(seed: int) -> str:
        fields = {"model": NAMES[seed % 2], "prompt": f"class A{seed}", "max_tokens": 12, "seed": seed}
        stream = client.completions.create(**fields, stream=True)
        parts = [chunk.choices[0] for chunk in stream]
        assert parts[-1].finish_reason
        return "".join(part.text for part in parts)

    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(ask, range(50)))
    assert len(set(together)) > 25
    assert together[::7] == [ask(seed) for seed in range(50)[::7]]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logprobs_are_the_models(served: Server, client: Any, name: str) -> None:
    model, tokenizer, _, _ = loaded(served, name)
    fields = {"model": name, "prompt": "import os\n", "temperature": 0.0}
    asked = {"max_tokens": 9, "logprobs": 3, "echo": True, "extra_body": {"routing": True}}
    [choice] = client.completions.create(**fields, **asked).choices
    told, tokens = choice.logprobs, choice.moelet["prompt"] + choice.moelet["tokens"]
    ids = [tokenizer.bos_id, *(token["id"] for token in tokens)]
    assert told.tokens == [tokenizer.pieces[i] for i in ids[1:]]
    logprob_SV = model.logits(model(torch.tensor([ids])).hidden)[0].log_softmax(-1)
    want = [logprob_SV[place, token_id].item() for place, token_id in enumerate(ids[1:])]
    # decoding may read matrices in bfloat16
    torch.testing.assert_close(torch.tensor(told.token_logprobs), torch.tensor(want), rtol=0.05, atol=0.08)
    assert all(len(likely) == 3 for likely in told.top_logprobs)
    texts = [choice.text[a:b] for a, b in zip(told.text_offset, [*told.text_offset[1:], None], strict=True)]
    assert texts == [token["text"] for token in tokens]
    [scored] = client.completions.create(**fields, max_tokens=0, logprobs=0, echo=True).choices
    assert scored.text == "import os\n" and scored.finish_reason == "length"
    assert scored.logprobs.token_logprobs == told.token_logprobs[: len(scored.logprobs.tokens)]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_routing_is_what_the_routers_do(served: Server, name: str) -> None:
    model, tokenizer, _, _ = loaded(served, name)
    told = served.complete(model=name, prompt="self.x", max_tokens=8, temperature=0, routing=True)["moelet"]
    tokens = [*told["prompt"], *told["tokens"]]
    assert "".join(token["text"] for token in told["prompt"]) == "self.x" and len(told["tokens"]) == 8
    ids, seen = [tokenizer.bos_id, *(token["id"] for token in tokens)], []
    with watched([moe.gate for moe in mixtures(model)], lambda layer, router, given, output: seen.append(output[:2])):
        model(torch.tensor([ids]))
    for layer, (ids_SK, weights_SK) in enumerate(seen):
        for place, token in enumerate(tokens, 1):
            experts, weights = zip(*token["experts"][layer], strict=True)
            want = weights_SK[place]
            assert (list(experts) == ids_SK[place].tolist()) or (want.max() - want.min()) < 0.02, (layer, place)
            assert weights == pytest.approx(sorted(want.tolist(), reverse=True), abs=0.03)
    assert all(abs(sum(p for *_, p in token["likely"])) <= 1.0001 and len(token["likely"]) == 8 for token in tokens)


def test_n_texts_differ_and_repeat_by_seed(served: Server) -> None:
    fields = {"prompt": ["x", "y"], "n": 3, "max_tokens": 8, "seed": 1}
    status, answer = served.ask("/v1/completions", fields)
    texts = [choice["text"] for choice in answer["choices"]]
    assert status == 200 and [choice["index"] for choice in answer["choices"]] == [*range(6)] and len(set(texts)) == 6
    assert [choice["text"] for choice in served.ask("/v1/completions", fields)[1]["choices"]] == texts
    assert served.complete(prompt="x", max_tokens=8, seed=2)["text"] == texts[1]  # seed + the number of the choice
    assert served.complete(max_tokens=20)["text"] != served.complete(max_tokens=20)["text"]
    ids = [1, *load(served.runs[0]).tokenizer.encode("x").tolist()]
    assert served.complete(prompt=ids, max_tokens=8, seed=1)["text"] == texts[0]


def test_a_stop_text_ends_it_and_never_shows(served: Server, client: Any) -> None:
    fields = {"model": "quick", "prompt": "for", "max_tokens": 60, "seed": 3}
    whole = client.completions.create(**fields).choices[0].text
    stop = whole[20:24]
    stops = ["never in it, surely", stop]
    [cut] = client.completions.create(**fields, stop=stops).choices
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    streamed = [chunk.choices[0] for chunk in client.completions.create(**fields, stop=stop, stream=True)]
    assert "".join(chunk.text for chunk in streamed) == cut.text and streamed[-1].finish_reason == "stop"


def test_usage_at_the_end_of_a_stream(client: Any) -> None:
    asked = client.completions.create(
        model="quick", prompt="x", max_tokens=5, seed=0, stream=True, stream_options={"include_usage": True}
    )
    *_, last = asked
    assert last.choices == [] and last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


REFUSED: list[tuple[Any, int, str]] = [
    (b"{", 400, "isn't JSON"),
    (b"[" * 60_000, 400, "isn't JSON"),
    (b"[]", 400, "JSON list"),
    (b'{"temperature": NaN}', 400, "NaN is no JSON number"),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, "isn't JSON"),
    ({"max_tokens": 1_000_000_000}, 400, "max_tokens is 1000000000, and at most 100000"),
    ({"max_tokens": 1e9}, 400, "max_tokens is"),
    ({"max_tokens": "9"}, 400, "max_tokens is 9"),
    ({"max_tokens": -1}, 400, "max_tokens is -1"),
    ({"temperature": -1}, 400, "temperature is -1"),
    ({"temperature": "hot"}, 400, "temperature is hot"),
    ({"top_k": "50"}, 400, "top_k is 50"),
    ({"top_k": 0}, 400, "top_k is 0"),
    ({"top_p": 0}, 400, "top_p is 0"),
    ({"n": 17}, 400, "n is 17"),
    ({"n": 9, "prompt": ["a", "b"]}, 400, "too many texts"),
    ({"logprobs": 21}, 400, "logprobs is 21"),
    ({"stop": [""]}, 400, "stop must be"),
    ({"stop": ["a"] * 5}, 400, "stop must be"),
    ({"stop": 7}, 400, "stop must be"),
    ({"prompt": {"a": 1}}, 400, "prompt must be"),
    ({"prompt": []}, 400, "prompt must be"),
    ({"prompt": [[]]}, 400, "prompt must be"),
    ({"prompt": [5, "x"]}, 400, "prompt must be"),
    ({"prompt": [True, True]}, 400, "prompt must be"),
    ({"prompt": [10**30]}, 400, "Ids are 0 to"),
    ({"prompt": [-1]}, 400, "Ids are 0 to"),
    ({"prompt": "\ud800"}, 400, "surrogate"),
    ({"prompt": "word " * 500}, 413, "context is 64"),
    ({"prompt": "x" * 70_000}, 413, "65536 bytes"),
    ({"max_tokns": 5}, 400, "Did you mean 'max_tokens'"),
    ({"\ud800": 5}, 400, "there is no field"),
    ({"suffix": "x"}, 400, "suffix isn't offered"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty isn't offered"),
    ({"best_of": 3}, 400, "best_of isn't offered"),
    ({"model": "\ud800"}, 404, "there is no model"),
    ({"stream_options": 5}, 400, "stream_options is 5"),
]


@pytest.mark.parametrize(("body", "status", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_refused_in_words(served: Server, body: Any, status: int, words: str) -> None:
    got, answer = served.ask("/v1/completions", body)
    assert got == status and words in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_fine(served: Server) -> None:
    idle = {"suffix": None, "logit_bias": {}, "presence_penalty": 0, "best_of": 1, "user": "me", "stop": None}
    assert served.complete(prompt="x", max_tokens=3, **idle)["finish_reason"]
    assert served.complete(prompt="x", max_tokens=3, top_p=1e-300)["finish_reason"]


def test_other_addresses(served: Server) -> None:
    assert served.ask("/v1/completions?q=x")[0] == 405
    assert served.ask("/v1/chat/completions", {})[0] == 404
    for path in ("/../hparams.json", "/%2e%2e/hparams.json", "/page.html", "/docs", "/openapi.json", "/page.css/"):
        assert served.ask(path)[0] == 404
    assert served.ask("/v1/completions", {}, **{"Content-Type": "text/plain"})[0] == 415
    assert served.ask("/health")[1]["status"] == "ok"


def seconds_of_a_question(served: Server) -> float:
    """Return how long this machine, which others use too, now takes to ask one."""
    began = time.monotonic()
    served.busy()
    return time.monotonic() - began


def wait_until(served: Server, counts: tuple[int, int]) -> float:
    """Return how long it took until so many texts were being written, and so many waited."""
    began = time.monotonic()
    while (now := served.busy()) != counts:
        assert time.monotonic() - began < 20, now
        time.sleep(0.01)
    return time.monotonic() - began


LONG = {"prompt": "x", "max_tokens": 100_000, "temperature": 0, "stream": True}


def test_who_goes_away_frees_the_place_within_a_second(served: Server) -> None:
    connections = [served.open(post(LONG, served.port)) for _ in range(20)]
    for connection in connections[:16]:
        assert connection.recv(50).startswith(b"HTTP/1.1 200")
    wait_until(served, (16, 4))
    slack = seconds_of_a_question(served)
    for connection in connections:
        connection.close()
    assert wait_until(served, (0, 0)) < 1 + 2 * slack


def test_who_goes_away_before_a_whole_answer_too(served: Server) -> None:
    connection = served.open(post(LONG | {"stream": False}, served.port))
    wait_until(served, (1, 0))
    slack = seconds_of_a_question(served)
    connection.close()
    assert wait_until(served, (0, 0)) < 1 + 2 * slack


# the line


class Slow:
    """A text that is written until it is told to stop."""

    def __init__(self) -> None:
        self.ended, self.steps = None, 0

    def parts(self) -> Iterator[Part]:
        while True:
            self.steps += 1
            time.sleep(0.002)
            yield Part([])

    def cut(self) -> Part:
        return Part([])


class Broken(Slow):
    def parts(self) -> Iterator[Part]:
        raise ZeroDivisionError("planted")
        yield Part([])


async def wait_for(counts: tuple[int, int], engine: Engine) -> None:
    async with asyncio.timeout(5):
        while engine.counts() != counts:
            await asyncio.sleep(0.005)


def test_the_line_is_bounded_and_moves_up() -> None:
    async def go() -> None:
        engine = Engine(Limits(at_once=2, waiting=3))
        texts = [Slow() for _ in range(5)]
        first, second = Order(texts[:2]), Order(texts[2:])  # type: ignore[arg-type]
        engine.take(first)
        engine.take(second)
        await wait_for((2, 3), engine)
        with pytest.raises(Refusal, match="3 texts are waiting already"):
            engine.take(Order([Slow()]))  # type: ignore[list-item]
        engine.cancel(first)
        await wait_for((2, 1), engine)
        async with asyncio.timeout(5):
            while not texts[3].steps:
                await asyncio.sleep(0.005)
        engine.cancel(second)
        await wait_for((0, 0), engine)
        assert not texts[4].steps
        engine.close()

    asyncio.run(go())


def test_time_ends_a_text(served: Server) -> None:
    """What was held back, as the possible beginning of a stop text, still comes out."""
    model, tokenizer, _, _ = loaded(served, "quick")
    wish = Wish(10**9, Sampling(0, None), ("surely never in it",), None, False, False)

    async def go() -> list[Letter]:
        engine = Engine(Limits(seconds=0.4))
        writing = Writing(Reader(model), tokenizer, [tokenizer.bos_id, 7], wish, 0)
        order = Order([writing])
        engine.take(order)
        letters = await order.letters()
        while not letters[-1].ended:
            letters += await order.letters()
        engine.close()
        return letters

    letters = asyncio.run(go())
    assert letters[-1].ended == "time" and sum(len(letter.part.tokens) for letter in letters) > 1


def test_turns_are_fair_and_a_bug_ends_one_text(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> list[Letter]:
        engine = Engine(Limits(at_once=4, seconds=0.3))
        texts = [Slow(), Broken(), Slow(), Slow()]
        order = Order(texts)  # type: ignore[arg-type]
        engine.take(order)
        letters: list[Letter] = []
        while len(letters) < 4:
            letters += await order.letters()
        engine.close()
        steps = [text.steps for text in texts if not isinstance(text, Broken)]
        assert min(steps) > 3 and max(steps) - min(steps) <= 3  # each ends by its own clock
        return letters

    assert sorted((letter.number, letter.ended) for letter in asyncio.run(go())) == [
        (0, "time"), (1, "failed"), (2, "time"), (3, "time"),
    ]  # fmt: skip
    assert "ZeroDivisionError: planted" in caplog.text


# text from tokens


def unfold(tokenizer: Tokenizer, text: str, *stops: str) -> tuple[list[str], Unfolding]:
    unfolding, shown = Unfolding(tokenizer, stops), []
    for token_id in tokenizer.encode(text):
        shown += unfolding.add(Token(int(token_id), "", None, [], []))
        if unfolding.stopped:
            return [token.text for token in shown], unfolding
    return [token.text for token in [*shown, *unfolding.rest()]], unfolding


@pytest.mark.parametrize("text", ["def f():\n", "é😀\u2581x", "\U0001f469\u200d\U0001f4bb", "a\x00b", "\ufffd\ufffd"])
def test_characters_come_whole(tokenizer: Tokenizer, text: str) -> None:
    shown, _ = unfold(tokenizer, text)
    assert "".join(shown) == text and len(shown) == len(tokenizer.encode(text))


@pytest.mark.parametrize(
    ("stops", "want"),
    [(["cd"], "ab"), (["bcd", "c"], "ab"), (["zz"], "abcdefab"), (["fab"], "abcde"), (["abx", "efa"], "abcd")],
)
def test_stops_across_tokens(tokenizer: Tokenizer, stops: list[str], want: str) -> None:
    shown, unfolding = unfold(tokenizer, "abcdefab", *stops)
    assert "".join(shown) == want and unfolding.stopped == (want != "abcdefab")


def test_half_a_character_at_the_end(tokenizer: Tokenizer) -> None:
    unfolding = Unfolding(tokenizer, ())
    *start, _ = tokenizer.encode("x😀")
    shown = [token.text for i in start for token in unfolding.add(Token(int(i), "", None, [], []))]
    assert shown == ["x"] and "".join(token.text for token in unfolding.rest()) == tokenizer.decode(start)[1:]


# who may ask


def scope(path: str = "/v1/models", **headers: str) -> dict[str, Any]:
    heads = {"host": "127.0.0.1:8000"} | headers
    return {"path": path, "headers": [(key.encode(), value.encode()) for key, value in heads.items() if value]}


LOCAL_RULES = Rules(frozenset({"localhost", "127.0.0.1", "::1"}))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, None),
        ({"host": "localhost:9000"}, None),  # through a tunnel
        ({"host": "LOCALHOST"}, None),
        ({"host": "[::1]:8000"}, None),
        ({"host": ""}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"host": "evil.example:80:127.0.0.1"}, 403),
        ({"host": "192.168.0.9:8000"}, 403),
        ({"host": "localhost:x"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, None),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),  # another server's page
        ({"origin": "null"}, 403),
    ],
)
def test_other_names_and_pages_are_kept_out(headers: dict[str, str], status: int | None) -> None:
    refusal = refuse(scope(**headers), LOCAL_RULES)
    assert (refusal and refusal.status) == status


def test_two_hosts_are_none() -> None:
    twice = scope()
    twice["headers"] *= 2
    assert refuse(twice, LOCAL_RULES)


def test_a_token_is_wanted_for_all_but_the_page() -> None:
    rules = Rules(frozenset({"box"}), addresses=True, token="0123456789abcdef")
    assert refuse(scope("/", host="box"), rules) is None
    assert refuse(scope("/", host="192.168.0.9:8000"), rules) is None
    assert refuse(scope("/", host="evil.example"), rules)
    for given, status in (
        ("", 401), ("Bearer x", 401), ("Basic 0123456789abcdef", 401), ("bearer 0123456789abcdef", None),
    ):  # fmt: skip
        refusal = refuse(scope(host="box", authorization=given), rules)
        assert (refusal and refusal.status) == status


def test_beyond_this_machine_only_with_a_token() -> None:
    with pytest.raises(UserError, match="Give --token"):
        rules_for(Door("0.0.0.0"))
    with pytest.raises(UserError, match="at least 16"):
        rules_for(Door("0.0.0.0", token="short"))
    with pytest.raises(UserError, match="no address"):
        rules_for(Door("no.such.host.invalid"))
    rules = rules_for(Door("0.0.0.0", token="0123456789abcdef", allowed=("Box.lan",)))
    assert "box.lan" in rules.hosts and "0.0.0.0" not in rules.hosts and rules.addresses
    assert not rules_for(Door("127.0.0.1")).addresses


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="Give another --port"):
        bind(Door(port=taken.getsockname()[1]))


# patience


async def flood(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000):
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """With heads that never end, answers that nobody reads, and more connections than there should be."""
    uvicorn, h11_impl = pytest.importorskip("uvicorn"), pytest.importorskip("uvicorn.protocols.http.h11_impl")
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(server, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(server, "CONNECTIONS", 3)
    head = b"GET / HTTP/1.1\r\nHost: localhost\r\n"

    async def go() -> None:
        listener = bind(Door(port=0))
        running = uvicorn.Server(uvicorn.Config(flood, **server.CONFIG, http=server.patient(h11_impl.H11Protocol)))
        task = asyncio.create_task(running.serve(sockets=[listener]))
        address = listener.getsockname()
        async with asyncio.timeout(20):
            opened = [await asyncio.open_connection(*address) for _ in range(3)]
            full, _ = await asyncio.open_connection(*address)
            assert (await full.read()).startswith(b"HTTP/1.1 429")
            opened[0][1].write(head)
            opened[1][1].write(head + b"\r\n")  # and doesn't read what comes
            for reader, _ in (opened[0], opened[2]):
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
            while running.server_state.connections:
                await asyncio.sleep(0.05)
            running.should_exit = True
            await task

    asyncio.run(go())


def test_a_slow_or_large_body(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(*chunks: bytes, pause: float = 0) -> AsyncIterator[bytes]:
        for chunk in chunks:
            await asyncio.sleep(pause)
            yield chunk

    assert asyncio.run(read_body("Application/JSON; charset=utf-8", body(b"{", b"}"))) == b"{}"
    monkeypatch.setattr(app, "BODY_SECONDS", 0.05)
    for kind, chunks, status in (
        ("text/plain", body(b"{}"), 415),
        ("application/json", body(b"{", b"}", pause=0.2), 408),
        ("application/json", body(*[b"x" * 9000] * 8), 413),
    ):
        with pytest.raises(Refusal) as refusal:
            asyncio.run(read_body(kind, chunks))
        assert refusal.value.status == status


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'fastapi isn\'t installed.*pip install -e "\.\[serve\]"'):
        serve([tmp_path], Door(), Limits(), lambda address, voices: None)


def test_the_command(tmp_path: Path, tiny_settings: TinySettings, tokenizer: Tokenizer) -> None:
    """A token is wanted, a dense run is served, and SIGTERM ends it at once though somebody listens: exit code 0."""
    dense = {"n_experts": 1, "top_k": 1, "d_ff": 64}
    run = make_run(tmp_path / "dense", tiny_settings, tokenizer, **dense)
    assert main(["serve", str(run), "--host", "0.0.0.0"]) == UserError.exit_code
    assert main(["serve", str(run), "--token", "short"]) == UserError.exit_code
    secret = "0123456789abcdef"
    with serving(tmp_path, [run], "--token", secret) as opened:
        assert opened.ask("/v1/models")[0] == 401
        key = {"Authorization": f"Bearer {secret}"}
        assert opened.ask("/v1/models", **key)[0] == 200
        body = {"prompt": "x", "max_tokens": 5, "routing": True}
        told = opened.ask("/v1/completions", body, **key)[1]["choices"][0]["moelet"]
        assert all(token["experts"] == [] for token in told["tokens"])
        listener = opened.open(post(LONG | {"max_tokens": 1024}, opened.port, **key))
        assert listener.recv(20).startswith(b"HTTP/1.1 200")
        opened.process.send_signal(signal.SIGTERM)
        assert opened.process.wait(10) == 0
        listener.close()
        assert opened.log.read_text() == ""


def test_one_text_is_never_longer_than_asked(served: Server) -> None:
    model, tokenizer, _, _ = loaded(served, "quick")
    prompt = [tokenizer.bos_id, *tokenizer.encode("x").tolist()]
    for n_new in (0, 1, 2):
        told = served.complete(prompt="x", max_tokens=n_new, temperature=0, routing=True)["moelet"]
        want = [row[0] for row in continuations(model, [prompt], n_new, Sampling(0, None))]
        assert [token["id"] for token in told["tokens"]] == want


def test_events_are_lines_of_json(served: Server) -> None:
    with served.open(post({"prompt": "x", "max_tokens": 3, "stream": True}, served.port, Connection="close")) as sent:
        answer = b""
        while part := sent.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: text/event-stream" in head.lower() and b"access-control" not in head.lower()
    events = [line.removeprefix(b"data: ") for line in body.split(b"\r\n") if line.startswith(b"data: ")]
    assert events[-1].strip() == b"[DONE]" and all(json.loads(event)["choices"] for event in events[:-1])
