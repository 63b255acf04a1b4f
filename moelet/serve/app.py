"""The addresses: the page, its two files, `/v1/models`, `/v1/completions`, `/health`. What they say is others' work.

Whoever goes away is noticed at once, also while waiting in line, and nothing more is written for them.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moelet.serve.answers import Answer, as_json
from moelet.serve.engine import Engine, Order
from moelet.serve.guard import Application, Message, Receive, Rules, Send, guarded
from moelet.serve.limits import BODY, Refusal
from moelet.serve.requests import make_request, read
from moelet.serve.writing import Reader, Writing
from moelet.storage.checkpoint import Loaded

PACE = 0.02  # seconds between the chunks of a stream, faster than an eye: what comes in between goes together
BODY_SECONDS = 10.0  # that a body may take to arrive
JSON, EVENTS = b"application/json", b"text/event-stream"
FILES = {"/": "page.html", "/page.js": "page.js"}
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


class Voice(NamedTuple):
    """A run, ready to write."""

    loaded: Loaded
    reader: Reader

    def card(self, name: str) -> dict[str, Any]:
        """Return what `/v1/models` says of it."""
        s, model = self.loaded.model.settings, self.loaded.model
        shape = {
            "n_layers": s.n_layers,
            "n_experts": s.n_experts,
            "top_k": s.top_k,
            "context": s.max_length,
            "step": self.loaded.step,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        return {"id": name, "object": "model", "created": 0, "owned_by": "moelet", "moelet": shape}


class Reply:
    """The answer to one request for completions, as an ASGI application: whole or streamed, until the client goes."""

    def __init__(self, engine: Engine, order: Order, answer: Answer, stream: bool, usage: bool) -> None:
        self._engine, self._order, self._answer = engine, order, answer
        self._stream, self._usage = stream, usage

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._send_events(send) if self._stream else self._send_whole(send))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self._engine.cancel(self._order)
            work.cancel()
            gone.cancel()

    async def _send_whole(self, send: Send) -> None:
        while not self._answer.complete:
            self._answer.note(await self._order.letters())
        if self._answer.failed:
            await _send_all(send, 500, JSON, as_json(FAILED))
        else:
            await _send_all(send, 200, JSON, as_json(self._answer.whole()))

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", EVENTS)]})
        async for event in self._events():
            await send({"type": "http.response.body", "body": b"data: %b\n\n" % event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        while not self._answer.complete:
            new = self._answer.note(await self._order.letters())
            if self._answer.failed:
                yield as_json(FAILED)
                return
            yield as_json(self._answer.chunk(new))
            await asyncio.sleep(0 if self._answer.complete else PACE)
        if self._usage:
            yield as_json(self._answer.last_chunk())
        yield b"[DONE]"


FAILED = {"error": {"message": "a bug: the server's log has it.", "type": "server_error", "param": None, "code": None}}


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_all(send: Send, status: int, kind: bytes, body: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(content_type: str, chunks: AsyncIterator[bytes]) -> bytes:
    """Return a JSON body. Raises Refusal where it is another kind, too large, or too slow."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body's Content-Type must be application/json.", "Content-Type")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in chunks:  # one that is too large is read to its end, so that the answer can be too
                size += len(chunk)
                parts += [chunk] if size <= BODY else []
    except TimeoutError:
        raise Refusal(408, f"the body took more than {BODY_SECONDS:g} s to arrive. Send it at once.") from None
    if size > BODY:
        raise Refusal(413, f"the body has over {BODY} bytes. Send less.")
    return b"".join(parts)


def make_app(voices: Mapping[str, Voice], engine: Engine, rules: Rules) -> Application:
    """Return the whole application, behind its guard."""
    from fastapi import FastAPI, Request, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    known = {name: (voice.loaded.tokenizer, voice.reader.context) for name, voice in voices.items()}
    cards = {name: voice.card(name) for name, voice in voices.items()}

    def say(value: Any, status: int = 200, **headers: str) -> Response:
        return Response(as_json(value), status, headers, "application/json")

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        more = {"Retry-After": "1"} if refusal.status == 429 else {}
        return say(refusal.body(), refusal.status, **more, **({} if refusal.status == 400 else {"Connection": "close"}))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        words = f"{request.method} {request.url.path[:80]}: {error.detail}. See docs/serve.md for what there is."
        return say(Refusal(error.status_code, words).body(), error.status_code, **dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # to nobody

    @app.get("/v1/models")
    async def models() -> Response:
        return say({"object": "list", "data": list(cards.values())})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        if name not in cards:
            raise Refusal(404, f"there is no such model. There are: {', '.join(cards)}.", "model", "model_not_found")
        return say(cards[name])

    @app.get("/health")
    async def health() -> Response:
        writing, waiting = engine.counts()
        return say({"status": "ok", "writing": writing, "waiting": waiting})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        given = read(await read_body(request.headers.get("content-type", ""), request.stream()))
        asked = make_request(given, known, engine.limits)
        voice, n = voices[asked.model], asked.fields.n
        writings = [
            Writing(voice.reader, voice.loaded.tokenizer, ids, asked.wish, (asked.wish.sampling.seed + choice) % 2**63)
            for ids in asked.prompts
            for choice in range(n)
        ]
        order = Order(writings)
        engine.take(order)
        stream, usage = asked.fields.stream, asked.fields.stream_options.include_usage
        return _as_response(Reply(engine, order, Answer(asked, voice.loaded.tokenizer), stream, usage), Response)

    _add_page(app, Response)
    return guarded(app, rules)


def _as_response(reply: Reply, response: Any) -> Any:
    """Return the reply as FastAPI takes it: an instance of its own class."""
    made = type("Replied", (response,), {"__call__": lambda self, *channel: reply(*channel)})
    return made()


def _add_page(app: Any, response: Any) -> None:
    """Add the page and its files, read once: no path that is asked for ever reaches the disk."""
    here = Path(__file__).parent
    texts = {address: (here / name).read_bytes() for address, name in FILES.items()}
    texts["/page.css"] = (here.parent / "report.css").read_bytes() + (here / "page.css").read_bytes()
    for address, text in texts.items():
        kind = KINDS[Path(FILES.get(address, address)).suffix]

        def show(text: bytes = text, kind: str = kind) -> Any:
            return response(text, media_type=f"{kind}; charset=utf-8")

        app.add_route(address, lambda request, show=show: show(), methods=["GET"])
