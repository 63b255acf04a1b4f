"""What the experts of a run do: its routers are watched on text, and what they did becomes plain numbers.

All measures are of the tokens that were read, so they are the text's as much as the model's. The page of them is
`page`'s.

Shapes: T tokens, E experts, K chosen per token, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moelet.console import Progress
from moelet.data import Batch, Validation, read_validation
from moelet.errors import UserError
from moelet.evaluate import evaluate
from moelet.health import RULES
from moelet.hparams import Hparams, make_hparams, with_text
from moelet.inspection.routing import INPUTS, Routes, mixtures, output_similarity, record, without_each
from moelet.inspection.specialisation import (
    agreement,
    finite,
    halves_apart,
    jensen_shannon,
    lift,
    taken,
    together,
    told_by_token,
    use_of,
)
from moelet.inspection.token_classes import CLASSES, classes_of
from moelet.inspection.words import sentences
from moelet.metrics import METRICS_FILE
from moelet.modelling import GPT
from moelet.precision import choose_device, choose_dtype
from moelet.report import read_metrics
from moelet.storage.checkpoint import load, load_run_settings
from moelet.storage.manifest import verified
from moelet.text.sources import label_of
from moelet.tokenizer import Tokenizer

TOKENS, ABLATION_TOKENS = 65_536, 4096  # of each text: looked at; read again without each expert in turn
AGREEMENT_TOKENS = 8192  # on which checkpoints are compared
FREQUENT = 20  # occurrences below which a token's lift is luck
LISTED = 12  # tokens named of each expert
SHOWN_TOKENS = 400  # of each text, with their experts, to be looked at
TRAINING_ROWS = 120  # of the load over training
Findings = dict[str, Any]


class Text(NamedTuple):
    """Text to watch routers on."""

    name: str
    hparams: Hparams
    split: str


class Seen(NamedTuple):
    """A text that was read, and what the routers did with it."""

    name: str
    text: Validation
    routes: Routes


def texts_of(hparams: Hparams, data: Sequence[str], text_field: str | None, origin: str) -> list[Text]:
    """Return the texts that `--data` names; else the run's held-out text, that of each part of a mix by itself."""
    if data:
        specs = list(dict.fromkeys(data))
        settings = [with_text(hparams, spec, text_field, origin) for spec in specs]
        return [Text(name, given, "all") for name, given in zip(short_names(specs), settings, strict=True)]
    parts = hparams.data.parts
    found = []
    for name, part in zip(short_names([label_of(part) for part in parts]), parts, strict=True):
        changed = hparams.model_dump(mode="json")
        changed["data"] |= {"mix": None} | part.model_dump(mode="json", exclude={"weight"})
        found.append(Text(name, make_hparams(changed, origin), "validation"))
    return found or [Text("held-out text", hparams, "validation")]


def short_names(specs: Sequence[str]) -> list[str]:
    """Return the last part of each path, the whole where that isn't the only one of its kind, numbered if need be."""
    short = [Path(spec).name or spec for spec in specs]
    names = [name if short.count(name) == 1 else spec for name, spec in zip(short, specs, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names, 1)]


def inspect(
    run: Path,
    data: Sequence[str] = (),
    text_field: str | None = None,
    tokens: int = TOKENS,
    ablation_tokens: int = ABLATION_TOKENS,
    progress: Progress | None = None,
) -> Findings:
    """Return what the experts of a run do with each text. Raises UserError for a dense run and for what isn't there."""
    hparams, _ = load_run_settings(run)
    if hparams.model.n_experts == 1:
        raise UserError(
            f"{run} is a dense run (model.n_experts is 1). Inspecting needs experts. Give a run that has some, or make "
            f"one of it: moelet upcycle {run} --run NEW"
        )

    def say(line: str) -> None:
        if progress is not None:
            progress.show(line, lasting=False)

    texts = texts_of(hparams, data, text_field, str(run))
    device = choose_device(hparams.train.device)
    dtype = choose_dtype(hparams.train.precision, device)
    model, tokenizer, _, step = load(run, device)
    length, size = hparams.model.max_length, hparams.batch_size
    seen = []
    for name, settings, split in texts:
        say(f"reading {name}")
        text = read_validation(settings.data, tokenizer, length, size, tokens, split)
        say(f"watching {text.n_tokens:,} tokens of {name}")
        seen.append(Seen(name, text, record(model, text.batches, dtype)))
    found: Findings = {
        "run": str(run),
        "step": step,
        **{key: getattr(hparams.model, key) for key in ("n_layers", "n_experts", "top_k", "shared_expert")},
        "classes": list(CLASSES),
        "texts": [_text(model, tokenizer, one, dtype) for one in seen],
        "layers": _layers(model, tokenizer, seen),
        "apart": _apart(seen, hparams.model.n_experts),
        "without": _without(model, tokenizer, seen, ablation_tokens, dtype, say),
        "checkpoints": _checkpoints(run, seen[0], device, dtype, say),
        "training": _training(run),
        "shown": [_shown(tokenizer, one) for one in seen],
    }
    return {"sentences": sentences(found), **found}


def _text(model: GPT, tokenizer: Tokenizer, seen: Seen, dtype: torch.dtype) -> Findings:
    """Return how much text it is, how well it is predicted, and the share of each class of token in it."""
    measured = evaluate(model, seen.text, dtype)
    classes_T = classes_of(tokenizer, seen.routes.ids_T)
    return {
        "name": seen.name,
        "tokens": len(seen.routes.ids_T),
        "bytes": measured.bytes,
        "bits_per_byte": measured.bits_per_byte,
        "classes": dict(
            zip(CLASSES, finite(np.bincount(classes_T, minlength=len(CLASSES)) / len(classes_T)), strict=True)
        ),
    }


def _layers(model: GPT, tokenizer: Tokenizer, seen: Sequence[Seen]) -> list[Findings]:
    """Return what each layer's router does with all texts together, and its load on each of them."""
    ids_T = np.concatenate([one.routes.ids_T for one in seen])
    classes_T = np.concatenate([classes_of(tokenizer, one.routes.ids_T) for one in seen])
    rows = [one.routes.rows_T for one in seen]
    starts = np.cumsum([0, *(int(row.max()) + 1 for row in rows)])
    rows_T = np.concatenate([row + start for row, start in zip(rows, starts, strict=False)])
    n_experts, layers = model.settings.n_experts, []
    for layer, moe in enumerate(mixtures(model)):
        chosen_TK = np.concatenate([one.routes.chosen_LTK[layer] for one in seen])
        entropy_T = np.concatenate([one.routes.entropy_LT[layer] for one in seen])
        inputs_TD = torch.cat([one.routes.inputs_LTD[layer] for one in seen])
        load_E = use_of(chosen_TK, n_experts) * n_experts
        told, common = told_by_token(ids_T, chosen_TK[:, 0], rows_T, n_experts)
        pairs_EE = together(chosen_TK, n_experts)
        layers.append({
            "load": finite(load_E),
            "load_by_text": {s.name: finite(use_of(s.routes.chosen_LTK[layer], n_experts) * n_experts) for s in seen},
            "dead_experts": np.flatnonzero(load_E == 0).tolist(),
            "starving_experts": np.flatnonzero(load_E < RULES["load"].alarm).tolist(),
            "entropy": round(float(entropy_T.mean()), 5),
            "told_by_token": finite([told])[0],
            "told_by_guess": finite([common])[0],
            "together": None if pairs_EE is None else [finite(row) for row in pairs_EE],
            "similarity": [finite(row) for row in output_similarity(moe, inputs_TD[:: -(-len(inputs_TD) // INPUTS)])],
            "experts": _experts(tokenizer, ids_T, classes_T, chosen_TK, n_experts),
        })  # fmt: skip
    return layers


def _experts(
    tokenizer: Tokenizer, ids_T: np.ndarray, classes_T: np.ndarray, chosen_TK: np.ndarray, n_experts: int
) -> list[Findings]:
    """Return what each expert takes: classes, and tokens by share of its own and by lift over their frequency."""
    classes_EC = taken(classes_T, chosen_TK, len(CLASSES), n_experts)
    ids_EV = taken(ids_T, chosen_TK, tokenizer.vocab_size, n_experts)
    frequency_V = np.bincount(ids_T, minlength=tokenizer.vocab_size)
    class_lift_EC = lift(classes_EC, np.bincount(classes_T, minlength=len(CLASSES)))
    found = []
    for expert in range(n_experts):
        total = max(1, int(ids_EV[expert].sum()))
        lift_V = lift(ids_EV[expert][None], frequency_V)[0]

        def token(
            i: int, counts_V: np.ndarray = ids_EV[expert], lift_V: np.ndarray = lift_V, n: int = total
        ) -> Findings:
            share, times = finite([counts_V[i] / n, lift_V[i]])
            return {"piece": tokenizer.pieces[i], "count": int(counts_V[i]), "share": share, "lift": times}

        by_share = np.argsort(-ids_EV[expert], kind="stable")[:LISTED]
        often = np.flatnonzero((frequency_V >= FREQUENT) & (ids_EV[expert] > 0))
        by_lift = often[np.lexsort((-ids_EV[expert][often], -lift_V[often]))][:LISTED]
        found.append({
            "tokens_by_share": [token(i) for i in by_share if ids_EV[expert, i]],
            "tokens_by_lift": [token(i) for i in by_lift if lift_V[i] > 1],
            "class_share": dict(zip(CLASSES, finite(classes_EC[expert] / total), strict=True)),
            "class_lift": dict(zip(CLASSES, finite(class_lift_EC[expert]), strict=True)),
        })  # fmt: skip
    return found


def _apart(seen: Sequence[Seen], n_experts: int) -> Findings:
    """Return how far apart each two texts' use of experts is, in bits, and what random halves of one text make."""
    halves: dict[str, list[list[float] | None]] = {}
    for one in seen:
        found = [halves_apart(chosen_TK, one.routes.rows_T, n_experts) for chosen_TK in one.routes.chosen_LTK]
        halves[one.name] = [None if pair is None else finite_list(pair) for pair in found]
    pairs = []
    for a, b in combinations(seen, 2):
        uses = [
            [use_of(one.routes.chosen_LTK[k], n_experts) for one in (a, b)] for k in range(len(a.routes.chosen_LTK))
        ]
        pairs.append({"texts": [a.name, b.name], "layers": [round(jensen_shannon(*use), 6) for use in uses]})
    return {"halves": halves, "pairs": pairs}


def finite_list(values: Sequence[float]) -> list[float]:
    return [round(value, 6) for value in values]


def first_rows(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """Return the first `rows` rows of the batches."""
    found: list[Batch] = []
    for batch in batches:
        if rows <= 0:
            break
        found.append(Batch(*(None if part is None else part[:rows] for part in batch)))  # type: ignore[arg-type]
        rows -= len(batch.input_ids)
    return found


def _without(
    model: GPT, tokenizer: Tokenizer, seen: Sequence[Seen], tokens: int, dtype: torch.dtype, say: Callable[[str], None]
) -> list[Findings]:
    """Return for each text how many bits per byte the loss rises by without each expert."""
    found = []
    count = model.settings.n_experts * len(mixtures(model))
    for one in seen if tokens else ():
        batches = first_rows(one.text.batches, math.ceil(tokens / model.settings.max_length))

        def note(done: int, name: str = one.name) -> None:
            say(f"{name} without each expert in turn: {done} of {count}")

        rise_LE, error_LE = without_each(model, batches, tokenizer.byte_lengths, dtype, note)
        used = int(sum((batch.labels >= 0).sum() for batch in batches))
        layers = [{"rise": finite(rise), "error": finite(error)} for rise, error in zip(rise_LE, error_LE, strict=True)]
        found.append({"text": one.name, "tokens": used, "layers": layers})
    return found


def _checkpoints(
    run: Path, seen: Seen, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
) -> list[Findings]:
    """Return for each two neighbours among the checkpoints that remain how much of the routing they agree on."""
    steps, watched = verified(run), []
    if len(steps) < 2:
        return []
    for step in steps:
        say(f"watching the checkpoint of step {step}")
        model = load(run, device, step).model
        batches = first_rows(seen.text.batches, math.ceil(AGREEMENT_TOKENS / model.settings.max_length))
        watched.append(record(model, batches, dtype).chosen_LTK)
    found = []
    for (a, chosen_a), (b, chosen_b) in pairwise(zip(steps, watched, strict=True)):
        shared = [agreement(x, y, model.settings.n_experts) for x, y in zip(chosen_a, chosen_b, strict=True)]
        found.append(
            {"steps": [a, b], "agreement": finite([s for s, _ in shared]), "chance": finite([c for _, c in shared])}
        )
    return found


def _training(run: Path) -> list[Findings]:
    """Return each expert's load over training, as logged; thinned, the last row kept."""
    rows = read_metrics(run) if (run / METRICS_FILE).exists() else []
    rows = [row for row in rows if row.get("expert_load")]
    rows = rows[:: -(len(rows) // TRAINING_ROWS + 1)][::-1]
    return [{key: row[key] for key in ("step", "tokens", "expert_load")} for row in rows]


def _shown(tokenizer: Tokenizer, seen: Seen) -> Findings:
    """Return the beginning of a text: its pieces, and per layer each one's experts and their weights."""
    routes = seen.routes.upto(SHOWN_TOKENS)
    return {
        "text": seen.name,
        "pieces": [tokenizer.pieces[i] for i in routes.ids_T],
        "experts": routes.chosen_LTK.tolist(),
        "weights": [
            [finite_list([round(float(w), 3) for w in token]) for token in layer] for layer in routes.weights_LTK
        ],
    }
