"""Sampling: what it draws from, that rows are apart, and that text arrives whole."""

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from moelet import generate
from moelet.errors import UserError
from moelet.generate import Sampling, choose, complete, continuations, stream_text
from moelet.modelling import GPT
from moelet.sections import ModelSettings
from moelet.tokenizer import Tokenizer

CONTEXT, VOCAB = 16, 360
GREEDY = Sampling(temperature=0)
PIECES = ["🏳️\u200d🌈 naïve", " 한국어😀", "e\u0301 ok", "\u2581", "👩\u200d👩\u200d👧"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([inspect.getsource(argparse.ArgumentParser)], VOCAB)


@pytest.fixture
def model(tokenizer: Tokenizer) -> GPT:
    return lively(tokenizer.vocab_size)


def lively(vocab_size: int, **changes: object) -> GPT:
    """Return a small model whose logits differ enough that greedy choices vary."""
    torch.manual_seed(0)
    shape = {"max_length": CONTEXT, "d_model": 24, "d_embed": 8, "n_layers": 2, "n_heads": 3, "d_ff": 40}
    # untied: a tied table would mostly repeat the last token
    model = GPT(ModelSettings(**{**shape, "n_experts": 5, "tie_embeddings": False, **changes}), vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model


def run(model: GPT, prompts: Sequence[Sequence[int]], n_new: int, sampling: Sampling = GREEDY) -> list[list[int]]:
    """Return each prompt's new ids."""
    return [list(row) for row in zip(*continuations(model, prompts, n_new, sampling), strict=True)]


def allow_eos(model: GPT, change: Callable[[Tensor], None]) -> None:
    """Let `change` edit the logits (B, 1, V) that the model gives."""
    original = type(model).logits

    def logits(hidden: Tensor) -> Tensor:
        value = original(model, hidden).clone()
        change(value)
        return value

    model.logits = logits  # type: ignore[method-assign]


def never_end(value: Tensor) -> None:
    value[..., Tokenizer.eos_id] = -1e9


def by_full_passes(model: GPT, prompt: list[int], n_new: int) -> list[int]:
    """Return the greedy continuation by the definition: a whole pass a token, the older half forgotten when full."""
    window, new = prompt[-CONTEXT:], []
    for _ in range(n_new):
        if len(window) > CONTEXT:
            window = window[-(CONTEXT // 2) :]
        with torch.no_grad():
            last = model.logits(model(torch.tensor([window])).hidden)[0, -1]
        last[[Tokenizer.unk_id, Tokenizer.bos_id, Tokenizer.pad_id]] = float("-inf")
        new.append(int(last.argmax()))
        window = [*window, new[-1]]
    return new


@pytest.mark.parametrize("length", [1, 2, 7, CONTEXT - 1, CONTEXT, CONTEXT + 5])
def test_greedy_is_the_argmax_of_full_passes_beyond_the_context_too(model: GPT, length: int) -> None:
    allow_eos(model, never_end)
    prompt = torch.randint(4, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    got = run(model, [prompt], 3 * CONTEXT)[0]
    assert got == by_full_passes(model, prompt, 3 * CONTEXT)
    assert len(set(got)) > 3


@pytest.mark.parametrize("context", [2, 3])
def test_the_smallest_contexts_slide(tokenizer: Tokenizer, context: int) -> None:
    model = lively(tokenizer.vocab_size, max_length=context)
    allow_eos(model, never_end)
    assert [len(row) for row in run(model, [[5], [6, 7, 8]], 9)] == [9, 9]


def test_a_seed_fixes_the_text(model: GPT) -> None:
    texts = [run(model, [[5, 6]], 12, Sampling(1.0, None, None, seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


NARROW = [Sampling(1.0, 1), Sampling(1.0, None, 1e-6), Sampling(1.0, 50, 1e-300), Sampling(1e-3), Sampling(1e-44)]


@pytest.mark.parametrize("sampling", NARROW)
def test_narrow_sampling_equals_greedy(model: GPT, sampling: Sampling) -> None:
    assert run(model, [[5, 6], [9]], 10, sampling) == run(model, [[5, 6], [9]], 10)


def drawn(probabilities: list[float], sampling: Sampling, times: int = 4000) -> list[float]:
    """Return how often each of the ids from EOS on is chosen."""
    # EOS has id 2; PAD, which comes next, can't be chosen
    ids = [Tokenizer.eos_id, *range(4, 3 + len(probabilities))]
    logits = torch.full((times, 3 + len(probabilities)), float("-inf"))
    logits[:, ids] = torch.tensor(probabilities).log()
    counts = choose(logits, sampling, torch.Generator().manual_seed(0)).bincount(minlength=logits.shape[1])
    assert counts[ids].sum() == times
    return (counts[ids] / times).tolist()


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (Sampling(1.0, None, None), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1.0, None, 1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1.0, None, 0.65), [0, 4 / 7, 0, 3 / 7]),  # 0.4 + 0.3 reach 0.65
        (Sampling(1.0, None, 0.75), [0, 4 / 9, 2 / 9, 3 / 9]),  # 0.4 + 0.3 don't reach 0.75
        (Sampling(1.0, None, 0.39), [0, 1, 0, 0]),
        (Sampling(1.0, 2, None), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, 99, None), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1.0, 3, 0.7), [0, 4 / 7, 0, 3 / 7]),  # of the three likeliest, 4/9 + 3/9 reach 0.7
        (Sampling(0.5, None, None), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares
        (Sampling(0.0, None, None), [0, 1, 0, 0]),
    ],
)
def test_what_is_drawn_by_hand(sampling: Sampling, want: list[float]) -> None:
    got = drawn([0.1, 0.4, 0.2, 0.3], sampling)
    assert got == pytest.approx(want, abs=0.03)
    assert [share == 0 for share in got] == [share == 0 for share in want]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 3), Sampling(1.5, None, 0.9), Sampling(2.0, None)])
def test_control_ids_never_come_out(model: GPT, sampling: Sampling) -> None:
    def tempt(value: Tensor) -> None:
        value[..., [Tokenizer.unk_id, Tokenizer.bos_id, Tokenizer.pad_id]] = 1e4
        never_end(value)

    allow_eos(model, tempt)
    assert all(token >= 4 for row in run(model, [[5], [6, 7]], 20, sampling) for token in row)


def test_ids_that_the_tokenizer_lacks_never_come_out(tokenizer: Tokenizer) -> None:
    """model.vocab_size may be larger than the tokenizer's; its last rows then have no text."""
    torch.manual_seed(0)
    shape = {"max_length": CONTEXT, "d_model": 24, "d_embed": 8, "n_heads": 3, "d_ff": 40, "n_experts": 5}
    model = GPT(ModelSettings(**shape, vocab_size=4000), tokenizer.vocab_size).eval()
    ids = [token for row in run(model, [[5, 6]], 30, Sampling(1.0, None)) for token in row]
    assert max(ids) < tokenizer.vocab_size
    assert "".join(stream_text(model, tokenizer, "def", 30, Sampling(1.0, None)))


def test_eos_ends_one_row_while_others_go_on(model: GPT) -> None:
    prompts, n_new = [[5, 6, 7], [8], [11, 12]], 9
    allow_eos(model, never_end)
    rows = run(model, prompts, n_new)
    stop = next(token for token in rows[0][2:] if token not in rows[1] + rows[2] + rows[0][:2])

    def end_in_place_of_it(value: Tensor) -> None:
        value[..., Tokenizer.eos_id] = value[..., stop] + 1e-3

    allow_eos(model, end_in_place_of_it)
    together = run(model, prompts, n_new)
    place = rows[0].index(stop)
    ended = [*rows[0][:place], Tokenizer.eos_id]
    assert together == [ended + [Tokenizer.pad_id] * (n_new - len(ended)), rows[1], rows[2]]
    assert [run(model, [prompt], n_new)[0] for prompt in prompts] == [ended, rows[1], rows[2]]


def test_generation_stops_when_every_row_has_ended(model: GPT) -> None:
    def end(value: Tensor) -> None:
        value[..., Tokenizer.eos_id] = 1e4

    allow_eos(model, end)
    assert run(model, [[5], [6, 7]], 10) == [[Tokenizer.eos_id], [Tokenizer.eos_id]]


def test_rows_equal_their_single_runs(model: GPT, tokenizer: Tokenizer) -> None:
    allow_eos(model, never_end)
    prompts = ["def", "a", "self.add"]
    singles = [complete(model, tokenizer, [prompt], 6, GREEDY)[0] for prompt in prompts]
    assert complete(model, tokenizer, prompts, 6, GREEDY) == singles
    assert len(set(singles)) == 3


def speak(monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> None:
    def spoken(model: GPT, prompts: Sequence[Sequence[int]], n_new: int, sampling: Sampling) -> Iterator[list[int]]:
        yield from ([token] for token in list(ids)[:n_new])

    monkeypatch.setattr(generate, "continuations", spoken)


@pytest.mark.parametrize("text", [*PIECES, "".join(PIECES), "plain words\n and more"])
@pytest.mark.parametrize("prompt", ["", "def ", "😀"])
def test_streamed_pieces_are_whole_characters(
    text: str, prompt: str, model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [*tokenizer.encode(text).tolist(), Tokenizer.eos_id, 5]
    speak(monkeypatch, ids)
    pieces = list(stream_text(model, tokenizer, prompt, 1000, GREEDY))
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "|".join(pieces)
    assert len(pieces) > 1 or len(text) == 1


def test_a_character_cut_by_the_end_is_shown_as_such(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("a😀").tolist()
    speak(monkeypatch, ids)
    text = "".join(stream_text(model, tokenizer, "", len(ids) - 1, GREEDY))
    assert text == tokenizer.decode(ids[:-1]) and text.startswith("a\N{REPLACEMENT CHARACTER}")


def test_bytes_that_are_no_characters_pass(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tokenizer.encode("😀").tolist()[:2] + tokenizer.encode("a😀b").tolist()
    speak(monkeypatch, broken)
    text = "".join(stream_text(model, tokenizer, "x", 100, GREEDY))
    assert text == tokenizer.decode(broken) and text.endswith("a😀b")


def test_streamed_text_is_the_completed_text(model: GPT, tokenizer: Tokenizer) -> None:
    sampling = Sampling(0.7, 40, None, 3)
    whole = complete(model, tokenizer, ["def f"], 11, sampling)[0]
    assert "".join(stream_text(model, tokenizer, "def f", 11, sampling)) == whole != ""


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-0.1), "temperature is -0.1"),
        (Sampling(temperature=float("inf")), "temperature is inf"),
        (Sampling(temperature=float("nan")), "temperature is nan"),
        (Sampling(top_k=0), "top-k is 0"),
        (Sampling(top_p=0.0), "top-p is 0.0"),
        (Sampling(top_p=1.01), "top-p is 1.01"),
        (Sampling(top_p=float("nan")), "top-p is nan"),
    ],
)
def test_wrong_sampling_is_refused(model: GPT, sampling: Sampling, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(continuations(model, [[5]], 1, sampling))
