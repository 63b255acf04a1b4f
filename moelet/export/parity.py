"""Whether an exported model is the one of the run: the same ids for text, the same logits, measured by a stranger.

The stranger is a process that can't import moelet (`stranger.py`). A router chooses, and where two experts are as good
as equally likely, rounding may choose otherwise in another program: from there on a row computes something else,
rightly. So logits are compared up to the first token of a row at which an expert was chosen by less than a margin, and
the loss on whole rows.

Shapes: S sequence, T tokens, E experts, V vocabulary.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moelet.data import START, one_epoch
from moelet.errors import TemporaryError, UserError
from moelet.hparams import Hparams
from moelet.modelling import GPT
from moelet.moe import Router
from moelet.sections import DataSettings
from moelet.storage.checkpoint import Loaded
from moelet.tokenizer import SPACE, Tokenizer

STRANGER = Path(__file__).with_name("stranger.py")
TEXTS, WINDOW = 200, 256  # of real text; pieces shuffled together, as for validation
ROWS, ROW_BYTES = 8, 2**30  # rows whose logits are compared: so many, or as many as have so many bytes of logits
PROMPTS, PROMPT, NEW_TOKENS = 20, 16, 32
# what tokenizers are known to trip over: spaces, control pieces and bytes by name, bytes that aren't characters' ends
ODD_TEXTS = (
    "", " ", "  two", "a  b ", "\n\n\t x\r\n", "<s> </s><pad><unk>", "<0x41><0xE2>", "\x00\x01", "naïve e\u0301 ﬁ ①",
    "日本語 한국어", "\U0001f600\U0001f3f3\ufe0f\u200d\U0001f308", "\u00a0\u3000\ufeff\u200b", "12345 007", "x" * 300,
    " " * 77, "-" * 50 + "=" * 33,
)  # fmt: skip


class Sample(NamedTuple):
    """Real text to compare on."""

    origin: str
    texts: list[str]
    rows: list[list[int]]  # of the context's length, where there is text enough
    prompts: list[list[int]]  # PROMPTS of them, however few the rows


class Limits(NamedTuple):
    """How far numbers may be apart."""

    logits: float
    margin: float  # of router scores: a choice by less may be another elsewhere
    loss: float  # nats a token, over whole rows


class Parity(NamedTuple):
    """What the stranger found."""

    software: str
    name: str  # of the class or architecture
    origin: str  # of the text
    texts: int  # that have equal ids
    tokens: int  # that were compared
    of_tokens: int
    logits: float  # largest difference
    logits_of_all: float  # likewise, close choices and what comes after them included
    loss: float  # largest difference of a row
    prompts: int  # that were continued by NEW_TOKENS, or to the end of the text or context
    same: int  # that went on token for token as with us


def sample_text(hparams: Hparams, tokenizer: Tokenizer, context: int, rows: int = ROWS) -> Sample:
    """Return held-out text of the run, or of the embedded corpus where that isn't on this machine any more."""
    origin, texts = "held-out text", []
    if hparams.data.source in ("files", "embedded", "mix") and all(part.source != "hub" for part in hparams.data.parts):
        try:
            texts = _texts(hparams.data)
        except (UserError, TemporaryError, OSError):
            texts = []
    if not texts:
        origin, texts = "the embedded corpus", _texts(DataSettings())
    ids = [id for text in texts for id in (tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id)]
    n_rows = max(1, min(rows, ROW_BYTES // (4 * context * tokenizer.vocab_size), len(ids) // context))
    rows_of_ids = [ids[at : at + context] for at in range(0, n_rows * context, context)]
    return Sample(origin, texts, rows_of_ids, _prompts(ids, context))


def _prompts(ids: list[int], context: int) -> list[list[int]]:
    """Return the beginnings of PROMPTS contexts; where there is too little text for so many, they overlap."""
    length = max(1, min(PROMPT, context - 1, len(ids) - 1))
    apart = max(1, min(context, (len(ids) - length) // PROMPTS))
    return [ids[at : at + length] for at in range(0, len(ids) - length + 1, apart)][:PROMPTS]


def _texts(settings: DataSettings) -> list[str]:
    found: list[str] = []
    nearby = settings.model_copy(update={"shuffle_window": min(settings.shuffle_window, WINDOW)})
    for pieces, _ in one_epoch(nearby, 0, "validation", START):
        found += [piece.text for piece in pieces if piece.text is not None]
        if not pieces or len(found) >= TEXTS:
            break
    return found[:TEXTS]


@contextmanager
def _margins(model: GPT) -> Iterator[list[Tensor]]:
    """Have each router that runs add by how much each token's last chosen expert was better than the next, (T,)."""
    found: list[Tensor] = []

    def note(router: Router, given: tuple[Any, ...], _: Any) -> None:
        scores_TE = F.linear(given[0].float(), router.weight)
        scores_TE = scores_TE if router.bias is None else scores_TE + router.bias
        if router.top_k < scores_TE.shape[1]:
            best = scores_TE.topk(router.top_k + 1).values
            found.append(best[:, -2] - best[:, -1])

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Router)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def our_logits(model: GPT, row: list[int], margin: float) -> tuple[Tensor, int]:
    """Return the logits of a row, (S, V), and before which token an expert was first chosen by less than `margin`."""
    with _margins(model) as margins:
        logits_SV = model.logits(model(torch.tensor([row])).hidden)[0]
    close = [(margin_T < margin).nonzero() for margin_T in margins]
    return logits_SV, min((int(where[0]) for where in close if len(where)), default=len(row))


def check_parity(kind: str, path: Path, loaded: Loaded, sample: Sample, limits: Limits, own_code: bool) -> Parity:
    """Return how an exported model compares. Raises UserError where it isn't the run's."""
    model, tokenizer = loaded.model, loaded.tokenizer
    texts = [*ODD_TEXTS, f"a{SPACE} b", *sample.texts]
    if kind == "gguf":  # llama.cpp takes that character for a space, and a file can't tell it otherwise
        texts = [text for text in texts if SPACE not in text]
    with tempfile.TemporaryDirectory() as scratch:
        files, made_files = (
            [Path(scratch, f"{name}{n}.npy") for n in range(len(rows))]
            for name, rows in (("row", sample.rows), ("made", sample.prompts))
        )
        ours = []
        for row, file in zip(sample.rows, files, strict=True):
            logits_SV, end = our_logits(model, row, limits.margin)
            np.save(file, logits_SV.numpy())
            ours.append((end, _loss(logits_SV, row)))
        job = {
            "path": str(path.absolute()), "own_code": own_code, "texts": texts, "rows": sample.rows,
            "ids": [[tokenizer.bos_id, *row.tolist()] for row in tokenizer.encode_batch(texts)],
            "prompts": sample.prompts,
            "new_tokens": min(NEW_TOKENS, model.settings.max_length - max(map(len, sample.prompts))),
            "logits": [str(file) for file in files], "made_logits": [str(file) for file in made_files],
            "suppressed": suppressed_ids(model), "end": tokenizer.eos_id, "context": model.settings.max_length,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        found = _ask_stranger(kind, job, Path(scratch))
        if found["wrong_ids"]:
            wrong, text = len(found["wrong_ids"]), texts[found["wrong_ids"][0]]
            raise _mismatch(found, f"{wrong} of {len(texts)} texts get other ids, such as {text[:40]!r}")
        same = _check_generated(model, sample.prompts, found, [np.load(file) for file in made_files], limits)
    largest = max(max(row[:end], default=0.0) for row, (end, _) in zip(found["differences"], ours, strict=True))
    of_all = max(max(row) for row in found["differences"])
    loss = max(abs(theirs - loss) for theirs, (_, loss) in zip(found["losses"], ours, strict=True))
    if not (largest <= limits.logits and loss <= limits.loss):
        raise _mismatch(found, f"logits are up to {largest:.2g} apart, the loss of a row {loss:.2g}")
    tokens, of_tokens = sum(end for end, _ in ours), sum(map(len, sample.rows))
    figures = (len(texts), tokens, of_tokens, largest, of_all, loss, len(sample.prompts), same)
    return Parity(found["software"], found["class"], sample.origin, *figures)


def suppressed_ids(model: GPT) -> list[int]:
    """Return the ids that generation never chooses: control pieces other than EOS, and rows without a piece."""
    return [Tokenizer.unk_id, Tokenizer.bos_id, Tokenizer.pad_id, *range(model.n_pieces, model.vocab_size)]


def _loss(logits_SV: Tensor, row: list[int]) -> float:
    return F.cross_entropy(logits_SV[:-1].double(), torch.tensor(row[1:])).item()


def _check_generated(
    model: GPT, prompts: list[list[int]], found: dict[str, Any], logits: list[np.ndarray], limits: Limits
) -> int:
    """Return how many prompts go on token for token as with us. Raises UserError where one may not go on as it does."""
    suppressed, same = torch.tensor(suppressed_ids(model)), 0
    for prompt, made, theirs in zip(prompts, found["made"], logits, strict=True):
        ours_SV, end = our_logits(model, prompt + made, limits.margin)
        ours_SV, n_sure = ours_SV[len(prompt) - 1 : -1], max(0, min(end - len(prompt) + 1, len(made)))
        allowed_SV = ours_SV.index_fill(1, suppressed, float("-inf"))
        behind_S = allowed_SV.amax(1) - allowed_SV.gather(1, torch.tensor(made)[:, None])[:, 0]
        same += int(bool((behind_S == 0).all()))
        if not n_sure:
            continue
        apart = (ours_SV[:n_sure] - torch.from_numpy(theirs[:n_sure])).abs().max().item()
        if not (apart <= limits.logits and behind_S[:n_sure].max() <= 2 * limits.logits):
            raise _mismatch(found, f"generation goes another way: its logits are up to {apart:.2g} apart")
    return same


def _mismatch(found: dict[str, Any], what: str) -> UserError:
    return UserError(
        f"{found['software']} makes another model of the export: {what}. Nothing was written. Try another version of "
        "it, and report what you see."
    )


def _ask_stranger(kind: str, job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    question, answer = scratch / "job.json", scratch / "result.json"
    question.write_text(json.dumps(job), encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", str(STRANGER), kind, str(question), str(answer)]
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise UserError(
            f"the exported model can't be used in a process of its own ({last}). Nothing was written. Try another "
            "version of transformers or llama-cpp-python, and report what you see."
        )
    return json.loads(answer.read_text(encoding="utf-8"))
