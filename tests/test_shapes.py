"""A name like `logits_TE` states a shape. Here every such name is traced with all-distinct sizes, and none may lie."""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import needs_kernels
from torch import Tensor

from moelet import attention, experts, generate, loss, modelling, moe, muon, rotary
from moelet.generate import Sampling, continuations
from moelet.kv_cache import KVCache
from moelet.loss import BALANCE, IGNORE, linear_cross_entropy
from moelet.modelling import GPT
from moelet.optim import OPTIMIZERS
from moelet.sections import ModelSettings, OptimSettings

MODULES = (attention, experts, generate, loss, modelling, moe, muon, rotary)
FILES = {str(Path(module.__file__ or "")) for module in MODULES}
SUFFIX = re.compile(r".*_([A-Z1c]+)$")
GENERIC = {"I", "O", "M"}  # widths of any matrix, how many of a shape: whatever, but the same all over a call
CHUNK = 11
# no two alike, so that a swap can't hide; L is the keys, and in loss.py the layers
MODEL = {"D": 21, "R": 9, "H": 3, "C": 7, "F": 6, "E": 5, "K": 4, "V": 37}
LAYERS, CONTEXT = 8, 32
MODERN = {
    "d_model": 24, "positions": "rope", "qk_norm": True, "embed_norm": True, "shared_expert": 6, "smear": True,
    "selection_bias": True, "embed_residual": True, "value_residual": True, "bigram_rows": 40,
}  # fmt: skip
EVEN = {"D": 24, "C": 8}  # heads that can turn
FULL = {**MODEL, "B": 2, "S": 13, "T": 26, "N": 104, "L": 13}
CACHED = {**MODEL, "B": 2, "S": 10, "T": 20, "N": 80, "L": 23}


def wrong_names(values: dict[str, Any], sizes: dict[str, int | None]) -> tuple[set[str], list[str]]:
    """Return the names that state a shape, and a line for each that lies. A size of None may be anything."""
    seen, wrong, generic = set(), [], {}
    for name, value in values.items():
        match = SUFFIX.match(name)
        if not match or not isinstance(value, Tensor):
            continue
        seen.add(name)
        fits = len(match[1]) == value.ndim
        for letter, size in zip(match[1], value.shape, strict=False):
            if letter in GENERIC:
                fits &= generic.setdefault(letter, size) == size
            elif letter == "c":
                fits &= 0 < size <= CHUNK
            elif letter == "1":
                fits &= size == 1
            else:
                fits &= letter in sizes and sizes[letter] in (None, size)
        if not fits:
            wrong.append(f"{name} is {tuple(value.shape)}")
    return seen, wrong


def trace(run: Callable[[], object], sizes: dict[str, int], files: set[str]) -> tuple[set[tuple[str, str]], list[str]]:
    """Return ({(function, name)} seen while `run` ran, the lies among them)."""
    seen: set[tuple[str, str]] = set()
    wrong: list[str] = []

    def hook(frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event != "return" or code.co_filename not in files:
            return
        here: dict[str, int | None] = {**sizes}
        if code.co_filename == loss.__file__:
            here["L"] = LAYERS
        if code.co_filename == generate.__file__:
            here["S"] = None  # a window that grows with every token, and the new part of it
        names, lies = wrong_names(frame.f_locals, here)
        seen.update((code.co_qualname, name) for name in names)
        wrong.extend(f"{code.co_qualname}: {lie}" for lie in lies)

    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        run()
    finally:
        sys.setprofile(before)
    return seen, sorted(set(wrong))


def names_written(path: str) -> set[tuple[str, str]]:
    """Return {(function, name)} for every shape-stating name that a file's functions assign or take."""
    found: set[tuple[str, str]] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                names = [arg.arg for arg in ast.walk(child.args) if isinstance(arg, ast.arg)]
                stores = (n for n in ast.walk(child) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
                names += [name.id for name in stores]
                found.update((prefix + child.name, name) for name in names if SUFFIX.match(name))

    visit(ast.parse(Path(path).read_text(encoding="utf-8")), "")
    return found


def tiny(**changes: object) -> GPT:
    torch.manual_seed(0)
    shape = {
        "max_length": CONTEXT, "d_model": 21, "d_embed": 9, "n_layers": LAYERS, "n_heads": 3, "d_ff": 30,
        "n_experts": 5, "top_k": 4, "dropout": 0.1,
    }  # fmt: skip
    return GPT(ModelSettings(**{**shape, **changes}), 37)


def train_once(model: GPT) -> None:
    ids = torch.randint(4, 37, (2, 13))
    segments = torch.where(torch.arange(13) < torch.tensor([[13], [9]]), torch.tensor([[1], [2]]), 0)
    labels = ids.where(segments > 0, IGNORE)
    for given in (None, segments):
        output = model(ids, given)
        features = model.features(output.hidden).flatten(0, 1)
        total = linear_cross_entropy(features, model.table, labels.flatten()) + model.logits(output.hidden).sum()
        if output.router:
            load = torch.stack([stats.assignments / stats.assignments.sum() for stats in output.router])
            probability = torch.stack([stats.probability / stats.tokens for stats in output.router])
            total = total + sum(rule(probability, load) for rule in BALANCE.values())
        total.backward()


def continue_cached(model: GPT) -> tuple[KVCache, Tensor]:
    cache, ids = KVCache(model.settings), torch.randint(4, 37, (2, 23))
    model(ids[:, :13], torch.arange(13) >= torch.tensor([[0], [4]]), cache)
    return cache, ids[:, 13:]


@pytest.fixture(scope="module")
def traced() -> tuple[set[tuple[str, str]], list[str]]:
    seen: set[tuple[str, str]] = set()
    wrong: list[str] = []

    def add(run: Callable[[], object], sizes: dict[str, int]) -> None:
        names, lies = trace(run, sizes, FILES)
        seen.update(names)
        wrong.extend(lies)

    chunk = loss.CHUNK_ROWS
    loss.CHUNK_ROWS = CHUNK
    try:
        for changes in (
            {"experts": "grouped"},
            {"experts": "reference", "attention": "sdpa"},
            {"activation": "swiglu", "normalize_top_k": True},
            {"activation": "swiglu", "experts": "reference"},
        ):
            model = tiny(**changes)
            add(lambda model=model: train_once(model), FULL)
            for new in (None, torch.ones(2, 10, dtype=torch.bool)):
                cache, rest = continue_cached(model)
                add(lambda model=model, cache=cache, rest=rest, new=new: model(rest, new, cache), CACHED)
        add(lambda: train_once(tiny(experts="batched", activation="swiglu")), FULL)
        for activation in ("silu", "swiglu"):  # in sizes that the kernels take
            shape = {"d_model": 96, "d_embed": 160, "d_ff": 320, "activation": activation}
            kernels = {**FULL, "D": 96, "R": 160, "C": 32, "F": 64}
            add(lambda shape=shape: train_once(tiny(**shape)), kernels)
        for changes in (MODERN, {**MODERN, "experts": "reference", "activation": "swiglu", "normalize_top_k": True}):
            model = tiny(**changes)
            add(lambda model=model: train_once(model), {**FULL, **EVEN})
            add(lambda model=model: OPTIMIZERS["muon"](model, OptimSettings()).step(), FULL)
            for new in (None, torch.ones(2, 10, dtype=torch.bool)):
                cache, rest = continue_cached(model)
                add(lambda model=model, cache=cache, rest=rest, new=new: model(rest, new, cache), {**CACHED, **EVEN})
        dense = {**FULL, "F": 30}
        add(lambda: train_once(tiny(n_experts=1, top_k=1, activation="swiglu")), dense)
        logits = torch.randn(2, 37)
        for sampling in (Sampling(0), Sampling(1.0, 5, 0.8)):
            add(lambda sampling=sampling: generate.choose(logits, sampling, torch.Generator()), FULL)
        prompts = [list(range(4, 17)), list(range(4, 12))]
        add(lambda: rows_only(tiny().eval(), prompts), FULL)
    finally:
        loss.CHUNK_ROWS = chunk
    return seen, sorted(set(wrong))


def rows_only(model: GPT, prompts: list[list[int]]) -> None:
    """Generate with the network's own frames out of sight: there S is 13 first and 1 afterwards."""
    hook = sys.getprofile()
    forward = type(model).forward

    def unseen(self: GPT, *args: Any) -> Any:
        sys.setprofile(None)
        try:
            return forward(self, *args)
        finally:
            sys.setprofile(hook)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", unseen)
        patch.setattr(model, "logits", lambda hidden: torch.zeros(*hidden.shape[:2], 37))
        list(continuations(model, prompts, 3, Sampling(0)))


def test_no_name_lies(traced: tuple[set[tuple[str, str]], list[str]]) -> None:
    assert traced[1] == []


@needs_kernels
def test_every_name_was_seen(traced: tuple[set[tuple[str, str]], list[str]]) -> None:
    written = set().union(*map(names_written, FILES))
    assert len(written) > 120
    assert written - traced[0] == set()


def test_sizes_are_distinct() -> None:
    assert len(set(FULL.values())) == len(FULL) - 1  # S and L are the same positions without a cache
    assert len(set(CACHED.values())) == len(CACHED)
    for sizes in (FULL, CACHED):
        assert len(set((sizes | EVEN).values())) == len(set(sizes.values()))
    assert len({*MODEL.values(), LAYERS, CONTEXT, CHUNK}) == len(MODEL) + 3


def honest(x_TD: Tensor, w_OI: Tensor, v_OI: Tensor) -> Tensor:
    y_TO = x_TD @ w_OI.T + x_TD @ v_OI.T
    return y_TO[:CHUNK]


def swapped(x_TD: Tensor) -> Tensor:
    x_DT = x_TD
    return x_DT


def flat(x_TD: Tensor) -> Tensor:
    x_TDE = x_TD
    return x_TDE


def two_widths(a_TO: Tensor, b_OT: Tensor) -> Tensor:
    return a_TO


def big_chunk(x_TD: Tensor) -> Tensor:
    x_cD = x_TD
    return x_cD


def not_one(x_TD: Tensor) -> Tensor:
    x_T1 = x_TD
    return x_T1


def test_lies_are_caught() -> None:
    x, here = torch.zeros(26, 21), {__file__}
    seen, wrong = trace(lambda: honest(x, torch.zeros(4, 21), torch.zeros(4, 21)), FULL, here)
    assert wrong == [] and {name for _, name in seen} == {"x_TD", "w_OI", "v_OI", "y_TO"}
    for liar in (swapped, flat, big_chunk, not_one):
        assert len(trace(lambda liar=liar: liar(x), FULL, here)[1]) == 1, liar.__name__
    assert trace(lambda: two_widths(torch.zeros(26, 5), torch.zeros(6, 26)), FULL, here)[1] != []
