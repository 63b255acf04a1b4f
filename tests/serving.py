"""A server for tests: `moelet serve` as a process of its own, on a free port of this machine."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import TinySettings, save_run

from moelet.hparams import make_hparams
from moelet.modelling import GPT
from moelet.tokenizer import Tokenizer

# `quick` has a shape that decode.c computes, `plain` one that it doesn't
WIDE = {"dropout": 0.0, "tie_embeddings": False}  # untied: tied tables that nobody trained repeat a token for ever
SHAPES: dict[str, dict[str, Any]] = {
    "quick": WIDE | {"d_model": 64, "n_heads": 4, "d_ff": 128, "max_length": 64},
    "plain": WIDE | {"d_model": 32, "n_heads": 4, "d_ff": 66, "max_length": 48, "n_experts": 3},
}
START_SECONDS = 120  # a busy machine imports torch in a minute


class Server(NamedTuple):
    """A server that runs."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path  # what it writes to stderr
    runs: list[Path]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        """Return the status and what a JSON answer says; a body that isn't None is sent as JSON."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        heads = ({} if data is None else {"Content-Type": "application/json"}) | headers
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, heads), timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def complete(self, **fields: Any) -> dict[str, Any]:
        """Return the first text of a completion that must be given."""
        status, answer = self.ask("/v1/completions", fields)
        assert status == 200, answer
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def open(self, data: bytes) -> socket.socket:
        """Return a connection on which `data` has been sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(data)
        return connection

    def busy(self) -> tuple[int, int]:
        """Return how many texts are being written, and how many wait."""
        _, told = self.ask("/health")
        return told["writing"], told["waiting"]

    def memory(self) -> int:
        """Return the bytes of memory that the process holds."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def post(body: Any, port: int, **headers: str) -> bytes:
    """Return the bytes of a request for completions; a header given as "" is left out."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    heads = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json", "Content-Length": str(len(data))}
    heads |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = ["POST /v1/completions HTTP/1.1", *(f"{name}: {value}" for name, value in heads.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode() + data


def make_run(path: Path, settings: TinySettings, tokenizer: Tokenizer, **shape: Any) -> Path:
    """Write a run whose model nobody trained, but which has opinions; return its folder."""
    hparams = make_hparams(settings(model=shape))
    torch.manual_seed(1)
    model = GPT(hparams.model, tokenizer.vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        model.table[Tokenizer.eos_id] = 0  # never the likeliest: texts go on
    return save_run(path, hparams, model, tokenizer)


@contextmanager
def serving(folder: Path, runs: list[Path], *options: str) -> Iterator[Server]:
    """While open, a server for the runs; its log stands in `folder`."""
    log = folder / "serve.log"
    command = [sys.executable, "-m", "moelet", "serve", *map(str, runs), "--port", "0", *options]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        yield Server(_port(process, log), process, log, runs)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout
        process.stdout.close()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    assert process.stdout
    until = time.monotonic() + START_SECONDS
    for line in process.stdout:
        if found := re.search(rb"^page  http://[^/]*:(\d+)/", line):
            return int(found[1])
        assert time.monotonic() < until
    pytest.fail(f"the server did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: TinySettings, tokenizer: Tokenizer
) -> Iterator[Server]:
    """A server of two runs, `quick` and `plain`, that gives each text half a minute."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    folder = tmp_path_factory.mktemp("served")
    runs = [make_run(folder / name, tiny_settings, tokenizer, **shape) for name, shape in SHAPES.items()]
    with serving(folder, runs, "--max-seconds", "30", "--max-tokens", "100000") as server:
        yield server
        assert server.log.read_text() == "", "a server that was used well has nothing to say"
