"""The Mixture-of-Experts layer: which experts a token uses, and the layer around them.

How the chosen experts are computed is `moelet.experts`'; what balance costs is `moelet.loss`'s. Statistics of the
routing are returned, never stored.

Shapes: T tokens, D model, E experts, F expert hidden, K chosen per token.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelet.errors import pick
from moelet.experts import GATED, hidden_activation, routed_ffn
from moelet.kernels.router import Route, can_route
from moelet.parallel.exchange import Exchange
from moelet.sections import ModelSettings


class RouterStats(NamedTuple):
    """What one layer's router did, over its real tokens, so that micro-batches and ranks add up. All float32."""

    probability: Tensor  # (E,) sum of router probabilities, differentiable
    assignments: Tensor  # (E,) how many times each expert was chosen
    tokens: Tensor  # () how many tokens were routed
    squares: Tensor  # () sum of squared logarithms of the sum of e^score, differentiable
    entropy: Tensor  # () sum of the probabilities' entropy, nats
    largest: Tensor  # () the largest score by size: a maximum, not a sum


def add_stats(totals: list[RouterStats], new: list[RouterStats]) -> list[RouterStats]:
    """Return two micro-batches' router statistics together, detached; `totals` may be empty."""
    new = [RouterStats(*(item.detach() for item in stats)) for stats in new]
    if not totals:
        return new
    return [
        RouterStats(*(x + y for x, y in zip(a, b, strict=True)))._replace(largest=a.largest.maximum(b.largest))
        for a, b in zip(totals, new, strict=True)
    ]


def softmax_route(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose each token's experts.

    Returns expert ids (T, K), best first, ties to the lowest id; their softmax weights (T, K), scaled to sum to 1
    where `normalize`; and all probabilities (T, E). A bias counts in the choice alone. Sources: Shazeer et al. 2017,
    eq. 3-5, without noise; Wang et al. 2024, "Auxiliary-loss-free load balancing", for the bias.
    """
    probability_TE = logits_TE.softmax(-1)
    ranked_TE = logits_TE.detach() if bias_E is None else logits_TE.detach() + bias_E
    ids_TK = torch.sort(ranked_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = probability_TE.gather(1, ids_TK)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return ids_TK, weights_TK, probability_TE


Routing = Callable[[Tensor, Tensor | None, int, bool], tuple[Tensor, Tensor, Tensor]]
ROUTERS: dict[str, Routing] = {"softmax": softmax_route}


class Router(nn.Module):
    """One score per expert; always computed in float32. The bias, where there is one, is moved by `moelet.step`."""

    bias: Tensor | None

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(settings.n_experts, settings.d_model))
        self.register_buffer("bias", torch.zeros(settings.n_experts) if settings.selection_bias else None)
        self.top_k, self.normalize = settings.top_k, settings.normalize_top_k
        self.route = pick(ROUTERS, settings.router, "model.router")

    def scores(self, x_TD: Tensor) -> Tensor:
        """Return every expert's score for each token, (T, E), float32 or better."""
        with torch.autocast(x_TD.device.type, enabled=False):
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            return F.linear(x_TD.to(wide), self.weight.to(wide))

    def forward(self, x_TD: Tensor, real_T: Tensor | None) -> tuple[Tensor, Tensor, RouterStats]:
        """Return expert ids (T, K), their weights (T, K) and the statistics of the tokens that aren't padding."""
        if self.route is softmax_route and can_route(x_TD, self.weight):
            chosen = Route.apply(x_TD, self.weight, self.bias, real_T, self.top_k, self.normalize)
            ids_TK, weights_TK, probability_E, choices_E, squares, (entropy, largest) = chosen
            tokens = choices_E.sum() / self.top_k
            return ids_TK, weights_TK, RouterStats(probability_E, choices_E, tokens, squares, entropy, largest)
        logits_TE = self.scores(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            ids_TK, weights_TK, probability_TE = self.route(logits_TE, self.bias, self.top_k, self.normalize)
            return ids_TK, weights_TK, _statistics(logits_TE, ids_TK, probability_TE, real_T)


def _statistics(logits_TE: Tensor, ids_TK: Tensor, probability_TE: Tensor, real_T: Tensor | None) -> RouterStats:
    chosen_TE = torch.zeros_like(probability_TE).scatter_(1, ids_TK, 1.0)  # ids are distinct within a token
    log_total_T, seen_TE = logits_TE.logsumexp(-1), logits_TE.detach()
    entropy_T = log_total_T.detach() - (probability_TE.detach() * seen_TE).sum(-1)
    if real_T is not None:
        real_T1 = real_T[:, None].to(probability_TE.dtype)
        probability_TE, chosen_TE, seen_TE = probability_TE * real_T1, chosen_TE * real_T1, seen_TE * real_T1
        log_total_T, entropy_T = log_total_T * real_T1[:, 0], entropy_T * real_T1[:, 0]
        tokens = real_T1.sum()
    else:
        tokens = chosen_TE.new_full((), float(chosen_TE.shape[0]))  # new_tensor would copy it from the host, and wait
    largest = seen_TE.abs().amax() if seen_TE.numel() else tokens
    squares, entropy = log_total_T.square().sum(), entropy_T.sum()
    return RouterStats(probability_TE.sum(0), chosen_TE.sum(0), tokens, squares, entropy, largest)


class Experts(nn.Module):
    """The matrices of all experts of a layer, stacked; each follows nn.Linear: (out, in)."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        shape = (settings.n_experts, settings.expert_width, settings.d_model)
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.gate_proj = nn.Parameter(torch.empty(shape)) if settings.activation in GATED else None
        self.down_proj = nn.Parameter(torch.empty(settings.n_experts, settings.d_model, settings.expert_width))
        self.activation, self.backend = settings.activation, settings.experts
        self.exchange: Exchange | None = None  # where some of the experts lie on other ranks

    def forward(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, beside: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Return each token's weighted sum of its experts' outputs, (T, D), and what `beside()` gives added to it."""

        def compute(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            matrices = (self.up_proj, self.gate_proj, self.down_proj)
            return routed_ffn(x_TD, ids_TK, weights_TK, *matrices, self.activation, self.backend)

        if self.exchange is not None:
            return self.exchange.routed_ffn(x_TD, ids_TK, weights_TK, compute, beside)
        y_TD = compute(x_TD, ids_TK, weights_TK)
        return y_TD if beside is None else y_TD + beside()


class MoE(nn.Module):
    """Router and experts in the place of a feed-forward layer. Padding is computed but never counted."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.gate = Router(settings)
        self.experts = Experts(settings)
        self.shared_expert = FeedForward(settings, settings.shared_expert) if settings.shared_expert else None

    def forward(self, x_TD: Tensor, real_T: Tensor | None) -> tuple[Tensor, RouterStats]:
        ids_TK, weights_TK, stats = self.gate(x_TD, real_T)
        shared = None if self.shared_expert is None else partial(self.shared_expert.outputs, x_TD)
        return self.experts(x_TD, ids_TK, weights_TK, shared), stats


class FeedForward(nn.Module):
    """A dense layer: what n_experts = 1 means, and the expert that all tokens share."""

    def __init__(self, settings: ModelSettings, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(settings.d_model, width, bias=False)
        gated = settings.activation in GATED
        self.gate_proj = nn.Linear(settings.d_model, width, bias=False) if gated else None
        self.down_proj = nn.Linear(width, settings.d_model, bias=False)
        self.activation = settings.activation

    def outputs(self, x_TD: Tensor) -> Tensor:
        gate_TF = None if self.gate_proj is None else self.gate_proj(x_TD)
        y_TD: Tensor = self.down_proj(hidden_activation(self.up_proj(x_TD), gate_TF, self.activation))
        return y_TD

    def forward(self, x_TD: Tensor, real_T: Tensor | None) -> tuple[Tensor, None]:
        return self.outputs(x_TD), None
