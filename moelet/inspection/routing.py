"""What a model's routers do with a text: the experts of every token, and what happens without one of them.

It watches the model that is there and computes nothing differently. What follows from it is `figures`'s.

Shapes: T tokens, D model, E experts, K chosen per token, L layers, B batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelet.data import Batch
from moelet.loss import IGNORE, linear_cross_entropy
from moelet.modelling import GPT
from moelet.moe import MoE, Router
from moelet.precision import autocast

INPUTS = 512  # tokens of a text whose experts' outputs are compared


class Routes(NamedTuple):
    """The routing of a text's tokens, in order, without padding."""

    ids_T: np.ndarray
    rows_T: np.ndarray  # which row of the batches each is in
    chosen_LTK: np.ndarray  # int16, the highest score first
    weights_LTK: np.ndarray
    entropy_LT: np.ndarray  # of the router's probabilities, as a share of the highest possible
    inputs_LTD: list[Tensor]  # what some of the tokens' experts were given; one a layer

    def upto(self, n: int) -> "Routes":
        """Return the first `n` tokens' alone."""
        arrays = (self.ids_T[:n], self.rows_T[:n], self.chosen_LTK[:, :n], self.weights_LTK[:, :n])
        return Routes(*arrays, self.entropy_LT[:, :n], self.inputs_LTD)


def mixtures(model: GPT) -> list[MoE]:
    return [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)]


@contextmanager
def watched(routers: Sequence[Router], note: Callable[..., Any]) -> Iterator[None]:
    """While open, call `note(layer, router, (x_TD, real_T), output)` for all that the routers do; what it returns, if
    not None, takes the place of the output.
    """

    def hook(layer: int) -> Callable[..., Any]:
        return lambda router, arguments, output: note(layer, router, arguments, output)

    handles = [router.register_forward_hook(hook(layer)) for layer, router in enumerate(routers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record(model: GPT, batches: Sequence[Batch], dtype: torch.dtype) -> Routes:
    """Return what the routers of a model in evaluation mode do with the batches."""
    routers, device = [moe.gate for moe in mixtures(model)], model.table.device
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in routers]
    inputs: list[list[Tensor]] = [[] for _ in routers]
    share = -(-INPUTS // len(batches))
    real_T = torch.empty(0)

    def note(layer: int, router: Router, arguments: Any, output: Any) -> None:
        x_TD = arguments[0][real_T]
        probability_TE = router.scores(x_TD).softmax(-1)
        entropy_T = -torch.special.xlogy(probability_TE, probability_TE).sum(-1) / math.log(probability_TE.shape[1])
        seen[layer].append((output[0][real_T].to(torch.int16), output[1][real_T], entropy_T))
        inputs[layer].append(x_TD[:: -(-len(x_TD) // share)].clone())

    ids, rows, first = [], [], 0
    with watched(routers, note):
        for batch in batches:
            moved = batch.to(device)
            real_BS = torch.ones_like(batch.input_ids) if batch.segments is None else batch.segments
            row_T, place_T = real_BS.nonzero(as_tuple=True)
            real_T = (real_BS != 0).flatten().to(device)
            ids.append(batch.input_ids[row_T, place_T])
            rows.append(row_T + first)
            first += len(batch.input_ids)
            with autocast(dtype, device):
                model(moved.input_ids, moved.segments)

    def joined(what: int) -> np.ndarray:
        found: np.ndarray = torch.stack([torch.cat([parts[what] for parts in layer]) for layer in seen]).cpu().numpy()
        return found

    arrays = (torch.cat(ids).numpy(), torch.cat(rows).numpy(), joined(0), joined(1), joined(2))
    return Routes(*arrays, [torch.cat(parts) for parts in inputs])


@contextmanager
def switched_off(router: Router, expert: int) -> Iterator[None]:
    """While open, the expert's score is minus infinity: its tokens go to the next best."""

    def reroute(layer: int, router: Router, arguments: Any, output: Any) -> Any:
        scores_TE = router.scores(arguments[0])
        scores_TE[:, expert] = -math.inf
        ids_TK, weights_TK, _ = router.route(scores_TE, router.bias, router.top_k, router.normalize)
        return ids_TK, weights_TK, output[2]

    with watched([router], reroute):
        yield


@torch.no_grad()
def row_nats(model: GPT, batches: Sequence[Batch], dtype: torch.dtype) -> np.ndarray:
    """Return each row's cross-entropy, summed over its tokens, in nats."""
    device, nats = model.table.device, []
    for batch in batches:
        moved = batch.to(device)
        with autocast(dtype, device):
            features_BSR = model.features(model(moved.input_ids, moved.segments).hidden)
            rows = zip(features_BSR, moved.labels, strict=True)
            nats += [linear_cross_entropy(features_SR, model.table, labels_S).item() for features_SR, labels_S in rows]
    return np.array(nats)


def predicted_bytes(batches: Sequence[Batch], byte_lengths: np.ndarray) -> int:
    """Return how many bytes of text the labels of the batches stand for."""
    return sum(int(byte_lengths[batch.labels[batch.labels != IGNORE].numpy()].sum()) for batch in batches)


def without_each(
    model: GPT, batches: Sequence[Batch], byte_lengths: np.ndarray, dtype: torch.dtype, note: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each layer and expert (L, E) the bits per byte that the loss rises by without it, and the standard
    error of that over rows, NaN where there is one; `note` is told how many are done.
    """
    per_byte = 1 / (math.log(2) * max(1, predicted_bytes(batches, byte_lengths)))
    whole, moes = row_nats(model, batches, dtype), mixtures(model)
    rise_LE = np.empty((len(moes), model.settings.n_experts, 2))
    for layer, moe in enumerate(moes):
        for expert in range(model.settings.n_experts):
            with switched_off(moe.gate, expert):
                rows = row_nats(model, batches, dtype) - whole
            error = math.sqrt(len(rows)) * rows.std(ddof=1) if len(rows) > 1 else math.nan
            rise_LE[layer, expert] = rows.sum() * per_byte, error * per_byte
            note(layer * model.settings.n_experts + expert + 1)
    return rise_LE[..., 0], rise_LE[..., 1]


@torch.no_grad()
def output_similarity(moe: MoE, x_TD: Tensor) -> np.ndarray:
    """Return the mean cosine of each two experts' outputs for the same tokens, (E, E)."""
    outputs = []
    for expert in range(moe.gate.weight.shape[0]):
        ids_T1 = torch.full((len(x_TD), 1), expert, device=x_TD.device)
        outputs.append(moe.experts(x_TD, ids_T1, torch.ones_like(ids_T1, dtype=torch.float32)).float())
    unit_ETD = torch.nn.functional.normalize(torch.stack(outputs), dim=-1)
    return (torch.einsum("etd,ftd->ef", unit_ETD, unit_ETD) / len(x_TD)).cpu().numpy()
