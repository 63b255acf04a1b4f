"""A model that moelet trained, for `transformers`: all that the weights beside this file need, and nothing of moelet.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` takes it from here. It is for use, not for
training: no dropout, no balance loss. Parameters are called as in moelet, so the weights are those of training as they
were. What each setting means stands in moelet's `sections.py`; `config.json` has them under "moelet".

Shapes: B batch, S sequence, L keys, T = B*S tokens, H heads, C head width, D model, E experts, K chosen a token,
F expert hidden, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

NORM_EPS = 1e-6
SMEAR_WIDTH = 12
LOOK_BACK = 2  # tokens: smearing looks at the one before, whose bigram looks at the one before that
HASH = (2_654_435_761, 40_503, 2**31 - 1)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
    "swiglu": F.silu,
}
GATED = {"swiglu"}
# transformers 5.24 calls it `cache`, those before `past_key_values`
CACHE = next(f.name for f in dataclasses.fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))


class MoeletConfig(PretrainedConfig):
    """The settings of the network, as moelet has them, and what `transformers` calls some of them."""

    model_type = "moelet"

    def __init__(self, moelet: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.moelet = s = moelet or {}
        self.vocab_size = s.get("vocab_size", 0)
        self.hidden_size, self.num_hidden_layers = s.get("d_model", 0), s.get("n_layers", 0)
        self.num_attention_heads = self.num_key_value_heads = s.get("n_heads", 1)
        self.max_position_embeddings = s.get("max_length", 0)
        kwargs["tie_word_embeddings"] = False  # where they are one, there is but one parameter
        super().__init__(**kwargs)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), NORM_EPS).to(x.dtype)


class Embedding(nn.Module):
    """Vectors of tokens and learned positions, and the output side of the projection."""

    def __init__(self, s: dict[str, Any]) -> None:
        super().__init__()
        self.scale, self.normed = s["embed_scale"], s["embed_norm"]
        self.tokens = nn.Embedding(s["vocab_size"], s["d_embed"] or s["d_model"])
        self.positions = nn.Embedding(s["max_length"], s["d_model"]) if s["positions"] == "learned" else None
        self.proj = nn.Linear(s["d_embed"], s["d_model"], bias=False) if s["d_embed"] else None

    def forward(self, ids_BS: Tensor, positions_BS: Tensor) -> Tensor:
        x_BSD = self.tokens(ids_BS)
        x_BSD = x_BSD if self.proj is None else self.proj(x_BSD)
        if self.normed:
            x_BSD = F.rms_norm(x_BSD.float(), x_BSD.shape[-1:], eps=NORM_EPS).to(x_BSD.dtype)
        x_BSD = x_BSD * self.scale
        return x_BSD if self.positions is None else x_BSD + self.positions(positions_BS)

    def rank(self, hidden_BSD: Tensor) -> Tensor:
        return hidden_BSD if self.proj is None else F.linear(hidden_BSD, self.proj.weight.T)


class Bigrams(nn.Module):
    """A vector for each token with the one before it; the first token of a text has row 0."""

    def __init__(self, s: dict[str, Any]) -> None:
        super().__init__()
        self.table = nn.Embedding(s["bigram_rows"], s["d_model"])

    def forward(self, ids_BS: Tensor, positions_BS: Tensor) -> Tensor:
        before_BS = F.pad(ids_BS, (1, -1))
        hashed_BS = (before_BS * HASH[0] + ids_BS * HASH[1]) % HASH[2] % (self.table.num_embeddings - 1) + 1
        return self.table(hashed_BS * (positions_BS > 0))


class Smear(nn.Module):
    """Each token's vector, and a share of the one before it, by a gate."""

    def __init__(self, s: dict[str, Any]) -> None:
        super().__init__()
        self.width = min(SMEAR_WIDTH, s["d_model"])
        self.gate = nn.Linear(self.width, 1, bias=False)
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, x_BSD: Tensor, positions_BS: Tensor) -> Tensor:
        gate_BS1 = self.gate(x_BSD[..., : self.width]).sigmoid() * (positions_BS > 0)[..., None]
        return x_BSD + self.share * gate_BS1 * F.pad(x_BSD, (0, 0, 1, -1))


class Attention(nn.Module):
    def __init__(self, s: dict[str, Any], layer: int) -> None:
        super().__init__()
        width, self.head_width, self.layer = s["d_model"], s["d_model"] // s["n_heads"], layer
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = (Norm(self.head_width) if s["qk_norm"] else None for _ in range(2))
        self.value_share = nn.Parameter(torch.zeros(1)) if s["value_residual"] and layer > 0 else None

    def _heads(self, x_BSD: Tensor, norm: Norm | None, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        x_BSHC = x_BSD.unflatten(-1, (-1, self.head_width))
        x_BSHC = x_BSHC if norm is None else norm(x_BSHC)
        if turns is not None:
            first, second = x_BSHC.float().chunk(2, -1)
            cos, sin = turns
            x_BSHC = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BSD.dtype)
        return x_BSHC.transpose(1, 2)

    def forward(
        self, x_BSD: Tensor, first_BSD: Tensor | None, turns: Any, mask: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor]:
        q_BHSC = self._heads(self.q_proj(x_BSD), self.q_norm, turns)
        k_BHLC = self._heads(self.k_proj(x_BSD), self.k_norm, turns)
        values_BSD = self.v_proj(x_BSD)
        if self.value_share is not None and first_BSD is not None:
            values_BSD = values_BSD.lerp(first_BSD, self.value_share.to(values_BSD.dtype))
        v_BHLC = values_BSD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        if cache is not None:
            k_BHLC, v_BHLC = cache.update(k_BHLC, v_BHLC, self.layer)
        out_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BHLC, v_BHLC, attn_mask=mask)
        return self.o_proj(out_BHSC.transpose(1, 2).flatten(2)), values_BSD


class FeedForward(nn.Module):
    def __init__(self, s: dict[str, Any], width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(s["d_model"], width, bias=False)
        self.gate_proj = nn.Linear(s["d_model"], width, bias=False) if s["activation"] in GATED else None
        self.down_proj = nn.Linear(width, s["d_model"], bias=False)
        self.activation = ACTIVATIONS[s["activation"]]

    def forward(self, x_TD: Tensor) -> Tensor:
        up_TF = self.up_proj(x_TD)
        if self.gate_proj is None:
            return self.down_proj(self.activation(up_TF))
        return self.down_proj(self.activation(self.gate_proj(x_TD)) * up_TF)


class Router(nn.Module):
    """Expert ids (T, K), ties to the lowest, and their weights, float32; a bias counts in the choice alone."""

    bias: Tensor | None

    def __init__(self, s: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(s["n_experts"], s["d_model"]))
        self.register_buffer("bias", torch.zeros(s["n_experts"]) if s["selection_bias"] else None)
        self.top_k, self.normalize = s["top_k"], s["normalize_top_k"]

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        ranked_TE = logits_TE if self.bias is None else logits_TE + self.bias.float()
        ids_TK = torch.sort(ranked_TE, dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        weights_TK = logits_TE.softmax(-1).gather(1, ids_TK)
        return ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True) if self.normalize else weights_TK


class Experts(nn.Module):
    def __init__(self, s: dict[str, Any]) -> None:
        super().__init__()
        shape = (s["n_experts"], s["d_ff"] // s["n_experts"], s["d_model"])
        self.up_proj = nn.Parameter(torch.zeros(shape))
        self.gate_proj = nn.Parameter(torch.zeros(shape)) if s["activation"] in GATED else None
        self.down_proj = nn.Parameter(torch.zeros(shape[0], shape[2], shape[1]))
        self.activation = ACTIVATIONS[s["activation"]]

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in ids_TK.unique().tolist():
            rows, chosen = (ids_TK == expert).nonzero(as_tuple=True)
            up = F.linear(x_TD[rows], self.up_proj[expert])
            gate = None if self.gate_proj is None else F.linear(x_TD[rows], self.gate_proj[expert])
            hidden = self.activation(up) if gate is None else self.activation(gate) * up
            y_TD[rows] += weights_TK[rows, chosen, None] * F.linear(hidden, self.down_proj[expert]).float()
        return y_TD.to(x_TD.dtype)


class MoE(nn.Module):
    def __init__(self, s: dict[str, Any]) -> None:
        super().__init__()
        self.gate, self.experts = Router(s), Experts(s)
        self.shared_expert = FeedForward(s, s["shared_expert"]) if s["shared_expert"] else None

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.experts(x_TD, *self.gate(x_TD))
        return y_TD if self.shared_expert is None else y_TD + self.shared_expert(x_TD)


class DecoderLayer(nn.Module):
    def __init__(self, s: dict[str, Any], layer: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(s["d_model"]), Norm(s["d_model"])
        self.self_attn = Attention(s, layer)
        self.mlp = MoE(s) if s["n_experts"] > 1 else FeedForward(s, s["d_ff"])
        self.embed_share = nn.Parameter(torch.zeros(1)) if s["embed_residual"] and layer > 0 else None

    def forward(
        self, x_BSD: Tensor, embedded_BSD: Tensor, first_BSD: Tensor | None, *place: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream after this layer, and its attention's values."""
        if self.embed_share is not None:
            x_BSD = x_BSD + self.embed_share * embedded_BSD
        attended_BSD, values_BSD = self.self_attn(self.input_layernorm(x_BSD), first_BSD, *place)
        x_BSD = x_BSD + attended_BSD
        y_TD = self.mlp(self.post_attention_layernorm(x_BSD).flatten(0, 1))
        return x_BSD + y_TD.view_as(x_BSD), values_BSD


class MoeletForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MoeletConfig
    base_model_prefix = ""
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012  as transformers wants it
    _supports_sdpa = True

    def __init__(self, config: MoeletConfig) -> None:
        super().__init__(config)
        s = config.moelet
        self.embed = Embedding(s)
        self.bigrams = Bigrams(s) if s["bigram_rows"] else None
        self.smear = Smear(s) if s["smear"] else None
        self.layers = nn.ModuleList(DecoderLayer(s, layer) for layer in range(s["n_layers"]))
        self.norm = Norm(s["d_model"])
        rank = s["d_embed"] or s["d_model"]
        self.lm_head = None if s["tie_embeddings"] else nn.Linear(rank, s["vocab_size"], bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave them: a model of this class comes from trained weights."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed.tokens

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids: Tensor, *rest: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *rest, **kwargs)
        n_new = inputs["input_ids"].shape[1]
        inputs["before_ids"] = input_ids[:, max(0, input_ids.shape[1] - n_new - LOOK_BACK) : input_ids.shape[1] - n_new]
        return inputs

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        before_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, S, V), float32; with labels also the mean cross-entropy of each next token.

        With a cache, a model that looks at the tokens before needs the last LOOK_BACK of them; `generate` gives them.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        mask, positions_BS, turns = self._place(input_ids, attention_mask, position_ids, cache)
        embedded_BSD = self._embedded(
            input_ids, positions_BS, before_ids, 0 if cache is None else cache.get_seq_length()
        )
        x_BSD, first_BSD = embedded_BSD, None
        for layer in self.layers:
            x_BSD, values_BSD = layer(x_BSD, embedded_BSD, first_BSD, turns, mask, cache)
            first_BSD = values_BSD if first_BSD is None else first_BSD
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        table_VR = self.embed.tokens.weight if self.lm_head is None else self.lm_head.weight
        logits_BSV = F.linear(self.embed.rank(self.norm(x_BSD[:, keep])), table_VR).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSV, **{CACHE: cache})

    def _embedded(self, ids_BS: Tensor, positions_BS: Tensor, before_ids: Tensor | None, start: int) -> Tensor:
        """Return what enters the layers, (B, S, D)."""
        n_before = 0
        if start and (self.bigrams is not None or self.smear is not None):
            n_before = min(start, LOOK_BACK)
            if before_ids is None or before_ids.shape[1] < n_before:
                raise ValueError(f"this model looks at the tokens before. Give the last {n_before} as before_ids.")
            ids_BS = torch.cat((before_ids[:, -n_before:], ids_BS), 1)
            steps_S = torch.arange(-n_before, 0, device=ids_BS.device)
            positions_BS = torch.cat(((positions_BS[:, :1] + steps_S).clamp(min=0), positions_BS), 1)
        x_BSD = self.embed(ids_BS, positions_BS)
        if self.bigrams is not None:
            x_BSD = x_BSD + self.bigrams(ids_BS, positions_BS)
        if self.smear is not None:
            x_BSD = self.smear(x_BSD, positions_BS)
        return x_BSD[:, n_before:]

    def _place(
        self, ids_BS: Tensor, mask_BL: Tensor | None, positions_BS: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Return what each token may see, where each stands, and the cosines and sines of its turn."""
        s, device = self.config.moelet, ids_BS.device
        start = 0 if cache is None else cache.get_seq_length()
        n_keys = start + ids_BS.shape[1]
        if n_keys > s["max_length"]:
            raise ValueError(f"{n_keys} tokens don't fit the context of {s['max_length']}. Cut them.")
        mask = torch.ones(n_keys, n_keys, dtype=torch.bool, device=device).tril()[start:]
        if mask_BL is not None:
            if mask_BL.ndim != 2:
                raise ValueError(f"attention_mask has {mask_BL.ndim} dimensions. Give one of batch by length.")
            real_BL = mask_BL[:, -n_keys:].bool()
            mask = (mask & (real_BL[:, start:, None] == real_BL[:, None]))[:, None]  # padding sees padding
            if positions_BS is None:
                positions_BS = (real_BL.cumsum(1) - 1).clamp(min=0)[:, start:]
        if positions_BS is None:
            positions_BS = torch.arange(start, n_keys, device=device)
        positions_BS = positions_BS.expand_as(ids_BS)
        if s["positions"] == "learned":
            return mask, positions_BS, None
        width = s["d_model"] // s["n_heads"]
        speed = s["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = (
            positions_BS.cpu()[..., None, None] * speed
        )  # (B, S, 1, C/2), on the host: not all devices have float64
        return mask, positions_BS, (angles.cos().float().to(device), angles.sin().float().to(device))
