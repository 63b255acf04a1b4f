"""Generation with the cache of keys and values: what full passes give, for any prompts, alone or together."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import HAVE_KERNELS
from scorecard import Trials
from test_generate import GREEDY, allow_eos, never_end, run
from torch import Tensor

from moelet import decoding, generate
from moelet.errors import UserError
from moelet.generate import Sampling
from moelet.kv_cache import KVCache
from moelet.modelling import GPT
from moelet.sections import ModelSettings
from moelet.tokenizer import Tokenizer

CONTEXT, VOCAB, NEW = 24, 120, 20
PLAIN: dict[str, Any] = {"max_length": CONTEXT, "n_layers": 2, "n_experts": 5, "tie_embeddings": False, "dropout": 0.1}
SHAPES: list[dict[str, Any]] = [
    {"d_model": 64, "n_heads": 4, "d_embed": 16, "d_ff": 160},  # decoded by the kernel in C
    {"d_model": 64, "n_heads": 2, "d_embed": None, "d_ff": 160, "positions": "rope", "qk_norm": True},
    {"d_model": 24, "n_heads": 3, "d_embed": 8, "d_ff": 40},
    {"d_model": 24, "n_heads": 3, "d_embed": 8, "d_ff": 40, "smear": True, "bigram_rows": 50, "value_residual": True},
]


def lively(seed: int, shape: dict[str, Any]) -> GPT:
    torch.manual_seed(seed)
    model = GPT(ModelSettings(**PLAIN, **shape), VOCAB).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model


def edit_logits(patch: pytest.MonkeyPatch, model: GPT, change: Callable[[Tensor], None]) -> None:
    """Let `change` edit the logits that the model gives, and those of decoding in C."""

    class Edited(decoding.Decoder):
        def logits(self, *arguments: Any) -> Tensor:
            value = super().logits(*arguments)
            change(value)
            return value

    allow_eos(model, change)
    patch.setattr(generate, "Decoder", Edited)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding reads its matrices as they are, not in bfloat16."""
    monkeypatch.setattr(decoding, "decoding_dtype", lambda: torch.float32)


@torch.no_grad()
def full_pass(model: GPT, ids: list[int]) -> Tensor:
    return model.logits(model(torch.tensor([ids])).hidden)[0]


def by_full_passes(model: GPT, prompts: list[list[int]], stops: bool) -> list[list[int]]:
    """Return each prompt's greedy ids by whole passes. All rows forget the older half when the longest one is full."""
    longest = max(map(len, prompts))
    windows = [prompt[max(0, len(prompt) - CONTEXT) :] for prompt in prompts]
    filled, new = min(longest, CONTEXT), [list[int]() for _ in prompts]
    for step in range(NEW):
        if step and filled + 1 > CONTEXT:
            windows, filled = [window[-(CONTEXT // 2) :] for window in windows], CONTEXT // 2 - 1
        filled += step > 0
        for row, window in enumerate(windows):
            if stops and Tokenizer.eos_id in new[row]:
                new[row].append(Tokenizer.pad_id)
                continue
            last = full_pass(model, window)[-1]
            last[[Tokenizer.unk_id, Tokenizer.bos_id, Tokenizer.pad_id]] = -1e9
            new[row].append(int(last.argmax()))
            window.append(new[row][-1])
        if stops and all(Tokenizer.eos_id in row for row in new):
            break
    return new


def favour_end(by: float, logits: Tensor) -> None:
    logits[..., Tokenizer.eos_id] += by


def random_prompts(trials: Trials, rows: int) -> list[list[int]]:
    lengths = [trials.random.randint(1, CONTEXT + 5) for _ in range(rows)]
    return [[trials.random.randrange(4, VOCAB) for _ in range(length)] for length in lengths]


@pytest.mark.check(25)
def test_prompts_of_any_length(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """The greedy ids are those of full passes, past the context too, alone or padded on the left in a batch."""
    for index in range(trials.count(small=6, full=200)):
        shape, prompts = SHAPES[index % len(SHAPES)], random_prompts(trials, [1, 3][index % 2])
        with trials.one(f"{index}: shape {index % len(SHAPES)}, lengths {list(map(len, prompts))}"):
            model = lively(index, shape)
            edit_logits(monkeypatch, model, never_end)
            assert run(model, prompts, NEW) == by_full_passes(model, [list(prompt) for prompt in prompts], False)


@pytest.mark.check(25)
def test_a_row_that_ends(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives padding from its end token on, and the other rows go on as if alone; all ended, generation stops."""
    ended = 0
    for index in range(trials.count(small=4, full=60)):
        model, prompts = lively(index, SHAPES[index % len(SHAPES)]), random_prompts(trials, 3)
        with trials.one(f"{index}: lengths {list(map(len, prompts))}"):
            edit_logits(monkeypatch, model, partial(favour_end, trials.random.uniform(1.0, 2.5)))
            got = run(model, prompts, NEW)
            assert got == by_full_passes(model, [list(prompt) for prompt in prompts], True)
            ended += sum(Tokenizer.eos_id in row for row in got)
    assert ended > 0, "no row ended: the test tells nothing"


@pytest.mark.check(25)
@torch.no_grad()
def test_a_prompt_in_chunks(trials: Trials) -> None:
    """Logits within 1e-5 of the full pass at every token, whatever the chunks; then a token at a time, in C too."""
    for index in range(trials.count(small=6, full=200)):
        shape, draw = SHAPES[index % len(SHAPES)], trials.random
        model = lively(index, shape)
        ids = torch.randint(4, VOCAB, (draw.choice([1, 3]), CONTEXT), generator=torch.Generator().manual_seed(index))
        with trials.one(f"{index}: shape {index % len(SHAPES)}"):
            want, cache, got = model.logits(model(ids).hidden), KVCache(model.settings), list[Tensor]()
            place = 0
            while place < CONTEXT - 4:
                size = min(draw.choice([1, 2, 5, 11]), CONTEXT - 4 - place)
                got.append(model.logits(model(ids[:, place : place + size], None, cache).hidden))
                place += size
            decoder = decoding.Decoder(model, torch.float32) if decoding.can_decode(model) else None
            assert (decoder is not None) == (HAVE_KERNELS and index % len(SHAPES) < 2)
            for place in range(CONTEXT - 4, CONTEXT):
                token = ids[:, place : place + 1]
                one = model.logits(model(token, None, cache).hidden) if decoder is None else None
                got.append(decoder.logits(token[:, 0], cache)[:, None] if decoder is not None else one)  # type: ignore
            both = torch.cat(got, 1)
            assert (both - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item() / 3)
            assert torch.equal(both.argmax(-1), want.argmax(-1))


@pytest.mark.check(25)
def test_more_than_the_context(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache refuses it in words and is as before; generation forgets the older half and goes on."""
    for index in range(trials.count(small=3, full=30)):
        model = lively(index, SHAPES[index % len(SHAPES)])
        cache = KVCache(model.settings)
        held = trials.random.randint(1, CONTEXT)
        more = trials.random.randint(CONTEXT - held + 1, CONTEXT + 5)
        with trials.one(f"{index}: {held} + {more} tokens"), torch.no_grad():
            model(torch.full((1, held), 5), None, cache)
            with pytest.raises(ValueError, match=f"{held + more} tokens don't fit the context of {CONTEXT}"):
                model(torch.full((1, more), 5), None, cache)
            assert cache.length == held
            edit_logits(monkeypatch, model, never_end)
            assert len(run(model, [[5] * (held + more)], 2 * CONTEXT)[0]) == 2 * CONTEXT


@pytest.mark.check(25)
def test_a_temperature_of_zero(trials: Trials) -> None:
    """Always the likeliest token, the first of equals, whatever the seed; what is out of range is refused in words."""
    generator = torch.Generator()
    for index in range(trials.count(small=5, full=100)):
        logits = torch.randint(-3, 4, (3, VOCAB), generator=torch.Generator().manual_seed(index)).float()
        want = []
        for row in logits.tolist():
            allowed = [token for token in range(VOCAB) if token not in (0, 1, 3)]
            want.append(max(allowed, key=lambda token: (row[token], -token)))
        with trials.one(f"{index}"):
            for sampling in (GREEDY, Sampling(0.0, 1, None, index), Sampling(0.0, None, 0.5, 7 * index)):
                assert generate.choose(logits, sampling, generator).tolist() == want
            with pytest.raises(UserError, match="temperature is -"):
                run(lively(0, SHAPES[2]), [[5]], 1, Sampling(temperature=-1.0 - index))
