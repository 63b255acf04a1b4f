"""Measures of what experts take, from the choices of a router alone: plain arrays in, plain arrays out.

Shapes: T tokens, E experts, K chosen per token, C classes of tokens, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np

SPLITS = 20  # into random halves, from whose mean comes what chance does


def use_of(chosen_TK: np.ndarray, n_experts: int) -> np.ndarray:
    """Return each expert's share of all choices, (E,); the fair one is 1 / E."""
    return np.bincount(chosen_TK.ravel(), minlength=n_experts) / max(1, chosen_TK.size)


def taken(kinds_T: np.ndarray, chosen_TK: np.ndarray, n_kinds: int, n_experts: int) -> np.ndarray:
    """Return how many tokens of each kind each expert takes, (E, kinds)."""
    flat = chosen_TK.astype(np.int64) * n_kinds + kinds_T[:, None]
    return np.bincount(flat.ravel(), minlength=n_experts * n_kinds).reshape(n_experts, n_kinds)


def lift(taken_EC: np.ndarray, kinds_C: np.ndarray) -> np.ndarray:
    """Return how often an expert takes a kind, relative to how often it takes any token: (E, C), 1 as often.

    `kinds_C` counts the tokens of each kind. NaN where there are none, or the expert takes none. It is also the kind's
    share of the expert's tokens relative to its share of the text.
    """
    n_tokens = kinds_C.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        found_EC: np.ndarray = (taken_EC / kinds_C) / (taken_EC.sum(1, keepdims=True) / n_tokens)
    return found_EC


def together(chosen_TK: np.ndarray, n_experts: int) -> np.ndarray | None:
    """Return how often each two experts are chosen for one token, relative to what their loads alone make of it: (E, E)
    with NaN on the diagonal. None where a token has one expert, or all.

    By chance, pairs would fall as the products of how many tokens choose each, scaled to as many as there are.
    """
    top_k = chosen_TK.shape[1]
    if top_k == 1 or top_k == n_experts:
        return None
    chosen_TE = np.zeros((len(chosen_TK), n_experts), dtype=np.float32)
    np.put_along_axis(chosen_TE, chosen_TK.astype(np.int64), 1.0, axis=1)
    pairs_EE = chosen_TE.T @ chosen_TE
    alone_E = chosen_TE.sum(0)
    chance_EE = np.outer(alone_E, alone_E)
    for pairs in (pairs_EE, chance_EE):
        np.fill_diagonal(pairs, 0.0)
    chance_EE *= pairs_EE.sum() / chance_EE.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        found_EE: np.ndarray = pairs_EE / chance_EE
    return found_EE


def jensen_shannon(p_E: np.ndarray, q_E: np.ndarray) -> float:
    """Return how far apart two distributions are, in bits: 0 where they are equal, 1 where they share nothing."""

    def surprise(a_E: np.ndarray, b_E: np.ndarray) -> float:
        there = a_E > 0
        return float((a_E[there] * np.log2(a_E[there] / b_E[there])).sum())

    middle_E = (p_E + q_E) / 2
    return max(0.0, (surprise(p_E, middle_E) + surprise(q_E, middle_E)) / 2)


def halves_apart(chosen_TK: np.ndarray, rows_T: np.ndarray, n_experts: int) -> tuple[float, float] | None:
    """Return how far apart the use of experts is in random halves of one text's rows: the mean over SPLITS, and the
    largest. None where there are fewer than four rows.

    Rows, not tokens, are drawn: what stands together is alike, and would make the halves too equal.
    """
    rows = np.unique(rows_T)
    if len(rows) < 4:
        return None
    use_RE = np.stack([use_of(chosen_TK[rows_T == row], n_experts) * (rows_T == row).sum() for row in rows])
    found = []
    for split in range(SPLITS):
        first = np.random.default_rng([len(rows), split]).permutation(len(rows)) < len(rows) // 2
        found.append(jensen_shannon(*(use_RE[half].sum(0) / use_RE[half].sum() for half in (first, ~first))))
    return float(np.mean(found)), max(found)


def told_by_token(ids_T: np.ndarray, first_T: np.ndarray, rows_T: np.ndarray, n_experts: int) -> tuple[float, float]:
    """Return how often a token's first choice is the one that its id had most often, and how often it is the choice
    most common of all. Learned on even rows, told on odd ones, so that neither knows the answers.

    NaN where there is but one row.
    """
    known, asked = rows_T % 2 == 0, rows_T % 2 == 1
    if not asked.any():
        return float("nan"), float("nan")
    common = int(np.bincount(first_T[known], minlength=n_experts).argmax())
    n_ids = int(ids_T.max()) + 1
    counts_VE = taken(first_T[known].astype(np.int64), ids_T[known][:, None], n_experts, n_ids)
    guess_V = np.where(counts_VE.any(1), counts_VE.argmax(1), common)
    told = float((guess_V[ids_T[asked]] == first_T[asked]).mean())
    return told, float((first_T[asked] == common).mean())


def agreement(a_TK: np.ndarray, b_TK: np.ndarray, n_experts: int) -> tuple[float, float]:
    """Return the share of choices that two routers have in common on the same tokens, and what chance would make of
    their loads.
    """
    shared = float((a_TK[:, :, None] == b_TK[:, None, :]).any(2).mean())
    chance = use_of(a_TK, n_experts) @ use_of(b_TK, n_experts) * a_TK.shape[1]
    return shared, float(chance)


def finite(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Return numbers as JSON holds them: rounded, None for what isn't finite."""
    return [round(float(value), 5) if np.isfinite(value) else None for value in values]
