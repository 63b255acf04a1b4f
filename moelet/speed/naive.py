"""The network as a person writes it first: what `moelet bench` measures our own code against.

The same architecture as `moelet.modelling`, but for LACKS, with the same weights the same loss; every score of the
attention square is computed and then masked, every expert is looped over with a boolean mask, all logits exist at once.
It knows nothing of caches, padding or segments, and nothing but the benchmark imports it.

Shapes: B batch, S sequence, T = B*S tokens, D model, R embedding rank, H heads, C head width, V vocabulary, E experts,
K chosen per token, L layers, n rows of one expert.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelet.errors import UserError
from moelet.experts import GATED, hidden_activation
from moelet.loss import BALANCE
from moelet.modelling import GPT, NORM_EPS
from moelet.sections import BalanceSettings, ModelSettings

LACKS = ("selection_bias", "embed_residual", "value_residual", "smear", "bigram_rows")


class NaiveAttention(nn.Module):
    """The full square of scores, masked."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width, length = settings.d_model, settings.max_length
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.head_width, self.dropout = settings.head_width, settings.dropout
        normed = settings.qk_norm
        self.q_norm = nn.RMSNorm(settings.head_width, eps=NORM_EPS) if normed else nn.Identity()
        self.k_norm = nn.RMSNorm(settings.head_width, eps=NORM_EPS) if normed else nn.Identity()
        self.rotary = settings.positions == "rope"
        speed = settings.rope_theta ** (-torch.arange(0, settings.head_width, 2) / settings.head_width)
        angles = torch.outer(torch.arange(length), speed).repeat(1, 2)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.allowed: Tensor
        self.register_buffer("allowed", torch.ones(length, length, dtype=torch.bool).tril(), persistent=False)

    def attend(self, q_BHSC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor) -> Tensor:
        length = q_BHSC.shape[2]
        scores_BHSS = (q_BHSC @ k_BHSC.transpose(-2, -1)) / math.sqrt(self.head_width)
        weights_BHSS = scores_BHSS.masked_fill(~self.allowed[:length, :length], float("-inf")).softmax(-1)
        return F.dropout(weights_BHSS, self.dropout, self.training) @ v_BHSC

    def turn(self, x_BHSC: Tensor) -> Tensor:
        if not self.rotary:
            return x_BHSC
        first, second = x_BHSC.chunk(2, -1)
        length = x_BHSC.shape[2]
        return x_BHSC * self.cos[:length] + torch.cat((-second, first), -1) * self.sin[:length]

    def forward(self, x_BSD: Tensor) -> Tensor:
        parts = self.qkv_proj(x_BSD).chunk(3, -1)
        q_BHSC, k_BHSC, v_BHSC = (part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in parts)
        q_BHSC, k_BHSC = self.turn(self.q_norm(q_BHSC)), self.turn(self.k_norm(k_BHSC))
        out_BHSC = self.attend(q_BHSC.to(v_BHSC.dtype), k_BHSC.to(v_BHSC.dtype), v_BHSC)
        return self.o_proj(out_BHSC.transpose(1, 2).flatten(2))


class SdpaAttention(NaiveAttention):
    """torch's own attention."""

    def attend(self, q_BHSC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor) -> Tensor:
        rate = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q_BHSC, k_BHSC, v_BHSC, dropout_p=rate, is_causal=True)


class NaiveExpert(nn.Module):
    """One feed-forward network, of which a dense layer has one and an MoE layer many."""

    def __init__(self, settings: ModelSettings, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(settings.d_model, width, bias=False)
        self.gate_proj = nn.Linear(settings.d_model, width, bias=False) if settings.activation in GATED else None
        self.down_proj = nn.Linear(width, settings.d_model, bias=False)
        self.activation = settings.activation

    def forward(self, x_TD: Tensor) -> Tensor:
        gate = None if self.gate_proj is None else self.gate_proj(x_TD)
        return self.down_proj(hidden_activation(self.up_proj(x_TD), gate, self.activation))


class NaiveMoE(nn.Module):
    """A loop over experts, each with a boolean mask of the tokens that chose it."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.gate = nn.Linear(settings.d_model, settings.n_experts, bias=False)
        self.experts = nn.ModuleList(NaiveExpert(settings, settings.expert_width) for _ in range(settings.n_experts))
        self.shared_expert = NaiveExpert(settings, settings.shared_expert) if settings.shared_expert else None
        self.top_k, self.normalize = settings.top_k, settings.normalize_top_k

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output (T, D), the mean router probability (E,) and each expert's share of the choices (E,)."""
        probability_TE = self.gate(x_TD).float().softmax(-1)
        weights_TK, ids_TK = probability_TE.topk(self.top_k, -1)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD) if self.shared_expert is None else self.shared_expert(x_TD)
        for index, expert in enumerate(self.experts):
            chosen_TK = ids_TK == index
            rows_n = chosen_TK.any(-1).nonzero()[:, 0]
            weight_n = (weights_TK * chosen_TK).sum(-1)[rows_n]
            y_TD = y_TD.index_add(0, rows_n, (expert(x_TD[rows_n]) * weight_n[:, None]).to(y_TD.dtype))
        load_E = F.one_hot(ids_TK, len(self.experts)).float().mean((0, 1))
        return y_TD, probability_TE.mean(0), load_E


class NaiveLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(
        self,
        settings: ModelSettings,
        attention: type[NaiveAttention],
        norm: type[nn.RMSNorm] | type[nn.LayerNorm],
    ) -> None:
        super().__init__()
        self.input_layernorm = norm(settings.d_model, eps=NORM_EPS)
        self.self_attn = attention(settings)
        self.post_attention_layernorm = norm(settings.d_model, eps=NORM_EPS)
        moe = settings.n_experts > 1
        self.mlp: NaiveMoE | NaiveExpert = NaiveMoE(settings) if moe else NaiveExpert(settings, settings.d_ff)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the stream and, of an MoE layer, its router probability and load."""
        x_BSD = x_BSD + self.dropout(self.self_attn(self.input_layernorm(x_BSD)))
        normed_TD = self.post_attention_layernorm(x_BSD).flatten(0, 1)
        if isinstance(self.mlp, NaiveExpert):
            return x_BSD + self.dropout(self.mlp(normed_TD).view_as(x_BSD)), []
        y_TD, probability_E, load_E = self.mlp(normed_TD)
        return x_BSD + self.dropout(y_TD.view_as(x_BSD)), [(probability_E, load_E)]


class NaiveGPT(nn.Module):
    """The whole network and its loss, cross-entropy plus balance, as one number."""

    def __init__(
        self,
        settings: ModelSettings,
        balance: BalanceSettings,
        vocab_size: int,
        attention: type[NaiveAttention] = NaiveAttention,
        norm: type[nn.RMSNorm] | type[nn.LayerNorm] = nn.RMSNorm,
    ) -> None:
        super().__init__()
        width, rank = settings.d_model, settings.d_embed or settings.d_model
        for name in LACKS:
            if getattr(settings, name):
                raise UserError(
                    f"model.{name} is set, and the plain network doesn't know it. Leave it out of --variants."
                )
        self.settings, self.balance = settings, balance
        self.tokens = nn.Embedding(vocab_size, rank)
        learned = settings.positions == "learned"
        self.positions = nn.Embedding(settings.max_length, width) if learned else None
        self.proj = nn.Linear(rank, width, bias=False) if settings.d_embed else None
        self.lm_head = None if settings.tie_embeddings else nn.Linear(rank, vocab_size, bias=False)
        self.layers = nn.ModuleList(NaiveLayer(settings, attention, norm) for _ in range(settings.n_layers))
        self.dropout = nn.Dropout(settings.dropout)
        self.norm = norm(width, eps=NORM_EPS)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)  # GPT-2's: a peer's speed doesn't depend on it

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        x_BSR = self.tokens(ids_BS)
        x_BSD = x_BSR if self.proj is None else self.proj(x_BSR)
        if self.settings.embed_norm:
            x_BSD = F.rms_norm(x_BSD, x_BSD.shape[-1:], eps=NORM_EPS)
        x_BSD = x_BSD * self.settings.embed_scale
        if self.positions is not None:
            x_BSD = x_BSD + self.positions.weight[: ids_BS.shape[1]]
        x_BSD = self.dropout(x_BSD)
        routing = []
        for layer in self.layers:
            x_BSD, of_layer = layer(x_BSD)
            routing += of_layer
        hidden_BSD = self.norm(x_BSD)
        hidden_BSR = hidden_BSD if self.proj is None else hidden_BSD @ self.proj.weight
        logits_BSV = F.linear(hidden_BSR, self.tokens.weight if self.lm_head is None else self.lm_head.weight)
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
        if routing and self.balance.loss is not None:
            probability_LE, load_LE = (torch.stack(parts) for parts in zip(*routing, strict=True))
            loss = loss + self.balance.alpha * BALANCE[self.balance.loss](probability_LE, load_LE)
        return loss


def copy_weights(ours: GPT, naive: NaiveGPT) -> None:
    """Give the naive network our weights: q, k and v become one matrix, each expert a module of its own."""
    state = {name.removeprefix("embed."): value for name, value in ours.state_dict().items()}
    for name in [name for name in state if name.endswith("q_proj.weight")]:
        parts = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    for name in [name for name in state if re.search(r"mlp\.experts\.\w+_proj$", name)]:
        for expert, weight in enumerate(state.pop(name)):
            state[name.replace("experts.", f"experts.{expert}.") + ".weight"] = weight
    naive.load_state_dict(state)
