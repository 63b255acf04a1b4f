"""Tasks: likelihoods against one text at a time, figures against hand-made ones, both against lm-eval where it is."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TinySettings, save_run

from moelet import generate, harness
from moelet.choices import Question, figures, read_task
from moelet.cli import main
from moelet.errors import TemporaryError, UserError
from moelet.generate import Sampling
from moelet.harness import Subject, adapter, examine, figures_of, generate_all, told
from moelet.hparams import make_hparams
from moelet.likelihood import Likelihood, encode_pairs, likelihoods, silent, windows
from moelet.modelling import GPT
from moelet.tokenizer import Tokenizer

ROWS: dict[str, list[dict[str, Any]]] = {
    "choices": [
        {"query": "def parse(self, text):\n", "choices": ["return text", "é", "raise ValueError"], "gold": 0},
        {"query": "import", "choices": ["sys", "argparse and all that it needs"], "gold": 1, "more": "is ignored"},
        {"query": "The parser  ", "choices": ["fills", "self.self.self"], "gold": 0},
        {"query": "word " * 60, "choices": ["return", "a longer one than the context holds " * 6], "gold": 1},
    ],
    "contexts": [
        {"context_options": ["a class", "a function of two"], "continuation": "is called with", "gold": 1},
        {"context_options": ["words:", "for name in names:"], "continuation": "print(name)", "gold": 0},
        {"context_options": ["if x\u2028", "else"], "continuation": "return", "gold": 0},
    ],
    "guess": [
        {"context": "self.parser = self.", "continuation": "parser"},
        {"context": "word " * 60, "continuation": "word"},
    ],
}


@pytest.fixture(scope="module")
def subject(tiny_settings: TinySettings, tokenizer: Tokenizer) -> Subject:
    """A model that learned nothing, with routers and logits far enough apart that nothing ties."""
    torch.manual_seed(0)
    model = GPT(make_hparams(tiny_settings()).model, tokenizer.vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.ndim == 1 else 4.0)
    return Subject(model, tokenizer, 4, torch.float32)


def write_task(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@torch.no_grad()
def slow_likelihood(model: GPT, context: list[int], continuation: list[int]) -> Likelihood:
    """One text, one token at a time."""
    total, greedy, length = 0.0, True, model.settings.max_length
    for k, token in enumerate(continuation):
        start = k // length * length  # the window that predicts this token, and what it begins with
        end = min(start + length, len(continuation))
        seen = (context + continuation)[max(0, len(context) + end - 1 - length) : len(context) + k]
        logits = model.logits(model(torch.tensor([seen])).hidden[:, -1:])[0, 0].double()
        total += F.log_softmax(logits, -1)[token].item()
        greedy = greedy and int(logits.argmax()) == token
    return Likelihood(total, greedy)


def some_pairs(subject: Subject) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(1, 1), (3, 2), (31, 1), (32, 1), (32, 4), (50, 32), (9, 32), (9, 33), (2, 100), (1, 64), (7, 5), (4, 5)]

    def ids(n: int) -> list[int]:
        return torch.randint(4, subject.tokenizer.vocab_size, (n,), generator=generator).tolist()

    return [(ids(context), ids(continuation)) for context, continuation in sizes]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_equal_one_text_at_a_time(subject: Subject, batch_size: int) -> None:
    pairs = some_pairs(subject)
    found = likelihoods(subject.model, pairs, batch_size, torch.float32)
    for pair, likelihood in zip(pairs, found, strict=True):
        assert likelihood.log_probability == pytest.approx(
            slow_likelihood(subject.model, *pair).log_probability, rel=1e-5
        )


def test_greedy_is_what_the_model_would_say(subject: Subject) -> None:
    prompt, said = [1, 50, 60], list[int]()
    with torch.no_grad():
        for _ in range(20):
            hidden = subject.model(torch.tensor([prompt + said])).hidden[:, -1:]
            said.append(int(subject.model.logits(hidden)[0, 0].argmax()))
    last = [*said[:19], (said[19] + 1) % 400]
    found = likelihoods(
        subject.model, [(prompt, said), (prompt, last), (prompt + said[:9], said[9:])], 4, torch.float32
    )
    assert [likelihood.greedy for likelihood in found] == [True, False, True]


def test_pairs_part_at_the_contexts_own_ids(subject: Subject) -> None:
    tokenizer = subject.tokenizer
    texts = [("def f", " (x)"), ("The end. \n", " And"), ("", "word"), ("  ", "word"), ("naïve 日本", " 語\u2581")]
    for (context, continuation), (context_ids, ids) in zip(texts, encode_pairs(tokenizer, texts), strict=True):
        assert context_ids == [tokenizer.bos_id, *tokenizer.encode(context.rstrip()).tolist()]
        assert tokenizer.decode([*context_ids, *ids]) == context + continuation


def test_windows_predict_each_id_once_with_all_that_fits() -> None:
    for length in (1, 4, 5):
        for n in range(1, 23):
            parts = windows([-2, -1], range(n), length)
            assert [i for _, ids in parts for i in ids] == list(range(n))
            assert all(len(ids) <= length for _, ids in parts)
            for context, ids in parts[1:]:
                assert len(context) + len(ids) == length + 1
                assert context == list(range(ids[0] - len(context), ids[0]))


def test_a_continuation_without_a_token_is_refused(subject: Subject) -> None:
    with pytest.raises(UserError, match="no token of its own"):
        likelihoods(subject.model, [([1], [5]), ([1, 5], [])], 4, torch.float32)


def test_figures_of_known_likelihoods() -> None:
    def answers(*values: float) -> list[Likelihood]:
        return [Likelihood(value, False) for value in values]

    texts = [("q", " a"), ("q", " b")]
    questions = [
        Question(texts, 0, [1, 4]),  # right, and by bytes wrong
        Question(texts, 1, [1, 4]),  # wrong, and by bytes right
        Question(texts, 1, [2, 2]),  # a tie goes to the first: wrong twice
        Question([*texts, ("q", " c")], 2, [1, 1, 1]),  # right twice
    ]
    found = [answers(-3, -4), answers(-3, -4), answers(-2, -2), answers(-9, -8, -1)]
    result = figures(questions, found)
    error = math.sqrt(4 * 0.25 / 3) / math.sqrt(4)
    assert result == {
        "n": 4,
        "chance": pytest.approx((3 / 2 + 1 / 3) / 4),
        "acc": 0.5,
        "acc_stderr": pytest.approx(error),
        "acc_bytes": 0.5,
        "acc_bytes_stderr": pytest.approx(error),
    }
    assert told(result) == "n 4, chance 0.4583, acc 0.5 ± 0.29, acc_bytes 0.5 ± 0.29"
    guessed = figures([Question(texts[:1], None, None)] * 2, [[Likelihood(-1, True)], [Likelihood(-3, False)]])
    assert guessed == {"n": 2, "acc": 0.5, "acc_stderr": 0.5, "perplexity": pytest.approx(math.e**2)}
    for nats in (709.5, math.inf):  # long continuations that a model finds impossible
        beyond = figures([Question(texts[:1], None, None)], [[Likelihood(-nats, False)]])
        assert beyond["perplexity"] is None and told(beyond) == "n 1, acc 0, perplexity too large for a number"
    single = figures([Question(texts, 0, None)], [answers(-1, -2)])
    assert single == {"n": 1, "chance": 0.5, "acc": 1.0, "acc_stderr": None}


def test_files_of_each_kind_are_read(tmp_path: Path) -> None:
    read = {kind: read_task(write_task(tmp_path / f"{kind}.jsonl", rows)) for kind, rows in ROWS.items()}
    assert read["choices"][0] == Question(
        [(ROWS["choices"][0]["query"], f" {c}") for c in ("return text", "é", "raise ValueError")], 0, [11, 2, 16]
    )
    assert read["contexts"][2].texts == [("if x\u2028", " return"), ("else", " return")]
    assert read["guess"][0] == Question([("self.parser = self.", " parser")], None, None)
    assert read_task(tmp_path / "choices.jsonl", "\nAnswer: ", 1)[0].texts[1][1] == "\nAnswer: é"
    assert [len(read_task(tmp_path / "choices.jsonl", limit=n)) for n in (1, 3, 99)] == [1, 3, 4]
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "choices.jsonl").read_bytes())
    assert read_task(marked) == read["choices"]
    marked.write_text(r'{"context": "a", "continuation": "\ud83d"}')
    with pytest.raises(UserError, match=r"line 1: continuation has the lone surrogate U\+D83D"):
        read_task(marked)
    with pytest.raises(UserError, match=r"--delimiter has the lone surrogate U\+DCFF"):
        read_task(marked, "\udcff")


GOOD = json.dumps(ROWS["choices"][1])
BAD = {
    "not JSON": ("{", "line 2 isn't JSON"),
    "a list": ("[1]", r"has the fields \[\]"),
    "other fields": ('{"question": "x", "choices": ["a", "b"]}', "It needs query, choices, gold; or"),
    "another kind": ('{"context": "a", "continuation": "b"}', "those before are .*query"),
    "no choice": ('{"query": "x", "choices": ["a"], "gold": 0}', "two or more"),
    "an empty choice": ('{"query": "x", "choices": ["a", ""], "gold": 0}', "none of them empty"),
    "a number": ('{"query": "x", "choices": ["a", 2], "gold": 0}', "list of two or more texts"),
    "a query that isn't text": ('{"query": ["x"], "choices": ["a", "b"], "gold": 0}', "query must be a text"),
    "gold past the end": ('{"query": "x", "choices": ["a", "b"], "gold": 2}', "gold is 2 and there are 2"),
    "gold below 0": ('{"query": "x", "choices": ["a", "b"], "gold": -1}', "gold is -1"),
    "half a choice": (
        r'{"query": "x", "choices": ["a", "\ud800"], "gold": 0}',
        r"one of choices has .*U\+D800",
    ),
    "half a query": (
        r'{"query": "x\udc00", "choices": ["a", "b"], "gold": 0}',
        r"query has .*U\+DC00.*Remove",
    ),
    "gold true": ('{"query": "x", "choices": ["a", "b"], "gold": true}', "gold is true"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_line_is_named(name: str, tmp_path: Path) -> None:
    line, words = BAD[name]
    (tmp_path / "task.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(UserError, match=f"task.jsonl, line 2.*{words}" if "line 2" not in words else words):
        read_task(tmp_path / "task.jsonl")


def test_files_that_hold_no_task_are_refused(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.jsonl", "can't be read"), (tmp_path / "empty.jsonl", "has no row")):
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(UserError, match=words):
            read_task(path)


# generation, as lm-eval asks for it


def test_generation_stops_and_batches_change_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "can_decode", lambda model: False)  # it takes lone prompts only, in bf16
    prompts = ["def parse(", "x", "the " * 40, "class Parser"]
    greedy = Sampling(temperature=0)
    alone = [subject.generate([prompt], 16, [], greedy)[0] for prompt in prompts]
    assert subject.generate(prompts, 16, [], greedy) == alone and all(alone)
    assert subject.generate(["the " * 40], 32, [], greedy)[0].startswith(alone[2]), "half of the context is kept"
    stop = alone[0][3:6]
    stopped = subject.generate(prompts, 16, ["never said", stop], greedy)
    assert stopped == [text.partition(stop)[0] for text in alone] and stopped[0] != alone[0]
    asked: list[tuple[str, dict[str, Any]]] = [
        (prompt, {"until": ["", stop] if k % 2 else [], "max_gen_toks": 16, "do_sample": False, "temperature": 0.9})
        for k, prompt in enumerate(prompts)
    ]
    assert generate_all(subject, asked, silent) == [(stopped if k % 2 else alone)[k] for k in range(4)]


# the command


@pytest.fixture(scope="module")
def run(subject: Subject, tiny_settings: TinySettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    return save_run(path, make_hparams(tiny_settings()), subject.model, subject.tokenizer)


def test_evaluate_scores_files(run: Path, subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(write_task(tmp_path / f"{kind}.jsonl", rows)) for kind, rows in ROWS.items()]
    given = ["evaluate", str(run), "--tokens", "300", "--tasks", ", ".join(files), "--json", str(tmp_path / "r.json")]
    assert main([*given, "--limit", "3"]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["loss"] > 0 and result["tasks"] == examine(subject, ",".join(files), limit=3)
    assert [result["tasks"][file]["n"] for file in files] == [3, 3, 2]
    assert "choices        n 3, chance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("none.jsonl", ["none.jsonl can't be read", "Give another"]),
        (" , ", ["--tasks is ' , '", "Give one"]),
        ("piqa", ["names piqa", "not installed", "pip install"]),
    ],
)
def test_mistakes_are_explained(
    tasks: str, words: list[str], run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert main(["evaluate", str(run), "--tasks", tasks]) == 78
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_errors_of_lm_eval_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    explain = harness._explained
    away = explain(ConnectionError("Couldn't reach 'x' on the Hub " + "!" * 999), ["piqa"])
    assert isinstance(away, TemporaryError) and "piqa" in str(away) and len(str(away)) < 700
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert isinstance(explain(ConnectionError("offline"), ["piqa"]), UserError)
    assert isinstance(explain(ModuleNotFoundError("No module named 'x'"), ["piqa"]), UserError)
    assert isinstance(explain(FileNotFoundError("no such dataset"), ["piqa"]), UserError)
    bug = KeyError("x")
    assert explain(bug, ["piqa"]) is bug


# lm-eval itself, where it is installed

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval isn't installed")


def lm_eval_tasks(folder: Path) -> list[dict[str, Any]]:
    """Return our files as tasks of lm-eval's."""
    kinds: dict[str, dict[str, Any]] = {
        "choices": {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"},
        "contexts": {
            "doc_to_text": lambda row: row["gold"],
            "doc_to_choice": lambda row: row["context_options"],
            "doc_to_target": lambda row: row["continuation"],
        },
        "guess": {"doc_to_text": "{{context}}", "doc_to_target": " {{continuation}}", "output_type": "loglikelihood"},
    }
    metrics = {"choices": ["acc", "acc_bytes"], "contexts": ["acc"], "guess": ["perplexity", "acc"]}
    return [
        {"task": kind, "dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / f"{kind}.jsonl")},
         "test_split": "train", "output_type": "multiple_choice", "metadata": {"version": 1},
         "metric_list": [{"metric": metric} for metric in metrics[kind]], **given}
        for kind, given in kinds.items()
    ]  # fmt: skip


@needs_lm_eval
@pytest.mark.nightly
def test_lm_eval_gives_the_same_figures(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.evaluator import simple_evaluate

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = {kind: str(write_task(tmp_path / f"{kind}.jsonl", rows * 3)) for kind, rows in ROWS.items()}
    ours = examine(subject, ",".join(files.values()))
    ended = simple_evaluate(adapter(subject), tasks=lm_eval_tasks(tmp_path), bootstrap_iters=2, log_samples=False)
    theirs = figures_of(ended)
    for kind, file in files.items():
        shared = set(ours[file]) & set(theirs[kind])
        assert shared >= {"n", "acc", "acc_stderr"} | ({"acc_bytes"} if kind == "choices" else set())
        for name in shared:
            assert ours[file][name] == pytest.approx(theirs[kind][name], rel=1e-9), (kind, name)


@needs_lm_eval
@pytest.mark.nightly
def test_lm_eval_reads_texts_as_we_do(subject: Subject) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    lm = adapter(subject)
    texts = [("def f", " (x)"), ("The end. \n", " And"), ("naïve 日本", " 語\u2581"), ("x " * 99, " y")]
    assert [lm._encode_pair(*text) for text in texts] == encode_pairs(subject.tokenizer, texts)
    for n in (1, 31, 32, 33, 64, 100):
        theirs = map(make_disjoint_window, get_rolling_token_windows(list(range(n)), -1, 32, 1))
        assert list(theirs) == windows([-1], range(n), 32)
    requests = [Instance("loglikelihood_rolling", {}, (text,), k) for k, text in enumerate(("", "a b" * 60, "word"))]
    found = lm.loglikelihood_rolling(requests)
    assert found[0] == 0.0
    for request, value in zip(requests[1:], found[1:], strict=True):
        ids = lm.tok_encode(request.args[0], add_special_tokens=False)
        assert value == pytest.approx(slow_likelihood(subject.model, [1], ids).log_probability, rel=1e-5)
    asked = Instance("generate_until", {}, ("def parse(", {"until": ["\n"], "max_gen_toks": 8}), 0)
    assert lm.generate_until([asked]) == subject.generate(["def parse("], 8, ["\n"], Sampling(temperature=0))


@needs_lm_eval
@pytest.mark.nightly
def test_an_unknown_name_is_explained(subject: Subject) -> None:
    with pytest.raises(UserError, match=r"names 'arc_esy'.*Did you mean 'arc_easy'\?"):
        examine(subject, "arc_esy")
