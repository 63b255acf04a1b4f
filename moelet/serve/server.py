"""A server for runs: the socket, the patience with connections, the end. `moelet.serve.app` says what it answers."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moelet.errors import UserError, require
from moelet.precision import choose_device
from moelet.serve.app import Voice, make_app
from moelet.serve.engine import Engine
from moelet.serve.guard import LOCAL, Rules
from moelet.serve.limits import Limits
from moelet.serve.writing import Reader
from moelet.storage.checkpoint import load

TOKEN_LENGTH = 16  # characters: too many to try
HEAD_SECONDS = 10.0  # that the head of a request may take to arrive
STALL_SECONDS = 30.0  # that a client may leave its answer unread
CONNECTIONS = 512  # open at a time, below the 1,024 files that a process may usually have open
FULL = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\nretry-after: 1\r\nconnection: close\r\n\r\n"

CONFIG: dict[str, Any] = {
    "ws": "none",
    "loop": "asyncio",
    "lifespan": "off",
    "log_level": "error",
    "access_log": False,
    "proxy_headers": False,  # nobody stands before us whose word on addresses counts
    "server_header": False,
    "timeout_keep_alive": 5,
    "timeout_graceful_shutdown": 2,
}


class Door(NamedTuple):
    """Where to listen, and for whom."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    token: str | None = None
    allowed: tuple[str, ...] = ()  # further names of this machine


def rules_for(door: Door) -> Rules:
    """Return who is let in. Raises UserError for an address that others reach, without a token."""
    local = _is_local(door.host)
    if door.token is None and not local:
        raise UserError(
            f"--host {door.host} can be reached from other machines, and there is no token. Anyone could use this "
            f"one. Give --token a secret of {TOKEN_LENGTH} characters or more, or leave --host out."
        )
    if door.token is not None and (len(door.token) < TOKEN_LENGTH or not door.token.isascii()):
        raise UserError(
            f"the token has {len(door.token)} characters. It must have at least {TOKEN_LENGTH}, all ASCII. Make one: "
            "python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    names = {name.lower() for name in (*LOCAL, door.host, *door.allowed)} - {"0.0.0.0", "::"}
    return Rules(frozenset(names), addresses=not local, token=door.token)


def _is_local(host: str) -> bool:
    """Return whether only this machine reaches the address, by all that its name stands for."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--host {host} is no address of this machine ({error}). Usual: 127.0.0.1.") from None
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def bind(door: Door) -> socket.socket:
    """Return the listening socket. Raises UserError where it can't be had."""
    family = socket.getaddrinfo(door.host, None, type=socket.SOCK_STREAM)[0][0]
    try:
        return socket.create_server((door.host, door.port), family=family, backlog=256)
    except OSError as error:
        raise UserError(
            f"{door.host}:{door.port} can't be listened on ({error.strerror}). Give another --port; 0 takes any "
            "that is free."
        ) from None


def load_voices(runs: Sequence[Path]) -> dict[str, Voice]:
    """Return the runs, ready to write, by the names of their folders; a second of the same name gets a number."""
    voices: dict[str, Voice] = {}
    for run in runs:
        loaded = load(run, choose_device("auto"))
        name = run.resolve().name or "run"
        voices[name if name not in voices else f"{name}-{len(voices) + 1}"] = Voice(loaded, Reader(loaded.model))
    return voices


def serve(runs: Sequence[Path], door: Door, limits: Limits, told: Callable[[str, dict[str, Voice]], None]) -> None:
    """Serve until interrupted; `told` hears the address once it is open."""
    require("fastapi", "serve")
    require("uvicorn", "serve")
    rules = rules_for(door)
    voices = load_voices(runs)
    listener = bind(door)
    engine = Engine(limits)
    host, port = listener.getsockname()[:2]
    told(f"http://{f'[{host}]' if ':' in host else host}:{port}", voices)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _run(make_app(voices, engine, rules), engine, listener)
    except KeyboardInterrupt:
        pass  # the usual end of a server
    finally:
        engine.close()


def _run(app: Any, engine: Engine, listener: socket.socket) -> None:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            engine.close()  # so that nobody's stream holds up the end
            await super().shutdown(sockets)

    Server(uvicorn.Config(app, **CONFIG, http=patient(H11Protocol))).run(sockets=[listener])


def patient(protocol: type[Any]) -> type[Any]:
    """Return uvicorn's protocol with an end to its patience: for heads that never end, answers that nobody reads, and
    more connections than there should be.
    """
    from h11 import IDLE

    class Patient(protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._head, self._stall = Alarm(self.loop, transport.abort), Alarm(self.loop, transport.abort)
            if len(self.connections) > CONNECTIONS:
                transport.write(FULL)
                transport.close()
                return
            self._head.set(HEAD_SECONDS)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is IDLE:
                self._head.set(HEAD_SECONDS)
            else:
                self._head.stop()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall.set(STALL_SECONDS)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stall.stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head.stop()
            self._stall.stop()
            super().connection_lost(exc)

    return Patient


class Alarm:
    """A timer that runs once: set again while it runs, it keeps its first time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], object]) -> None:
        self._loop, self._ring = loop, ring
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        self._timer = self._timer or self._loop.call_later(seconds, self._ring)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
