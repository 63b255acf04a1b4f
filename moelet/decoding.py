"""One new token a row on a CPU, the whole network in one call of C: `kernels/decode.c`.

It computes what `GPT.forward` and `GPT.logits` do with a KV cache, without the time of the hundred small operations
between the products. Shapes: B batch, V vocabulary, L layers, K chosen per token.
"""

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moelet.kernels.experts import ACTIVATIONS
from moelet.kernels.native import LANES, address, library, threads, usable
from moelet.kv_cache import KVCache
from moelet.modelling import GPT, NORM_EPS, DecoderLayer
from moelet.moe import FeedForward, MoE
from moelet.precision import cpu_has_bf16
from moelet.sections import ModelSettings

_COUNTS = ("layers", "width", "heads", "rank", "pieces", "experts", "chosen", "hidden", "context")
_OF_LAYER = (
    *("input_norm", "post_norm", "q_norm", "k_norm", "router", "bias"),
    *("q", "k", "v", "o", "up", "gate", "down", "keys", "values"),
)


class _Layer(ctypes.Structure):
    """`layer` of decode.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _OF_LAYER)


class _Network(ctypes.Structure):
    """`network` of decode.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_int) for name in ("activation", "gated", "normalize", "embed_norm")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "cos", "sin", "proj", "table", "norm", "layer")),
    )


def decodes(s: ModelSettings) -> bool:
    """Return whether the kernel computes networks of this shape: widths that its vectors divide, no added parts."""
    added = s.shared_expert or s.embed_residual or s.value_residual or s.smear or s.bigram_rows
    if s.router != "softmax" or added:
        return False
    turned = s.head_width // 2 if s.positions == "rope" else s.head_width
    widths = (s.d_model, s.head_width, turned, s.d_embed or s.d_model, s.expert_width)
    return all(width % LANES == 0 for width in widths)


def can_decode(model: GPT) -> bool:
    """Return whether the kernel computes this model, which must be on a CPU."""
    plain = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return plain and decodes(model.settings) and usable(torch.float32, model.table)


def decoding_dtype() -> torch.dtype:
    """Return the format in which decoding reads matrices: bfloat16 where the CPU multiplies it, else float32."""
    return torch.bfloat16 if cpu_has_bf16() and usable(torch.bfloat16) else torch.float32


class Decoded(NamedTuple):
    """What one new token a row gave."""

    logits_BV: Tensor  # of the tokens that follow, float32
    ids_LBK: Tensor  # the experts that each layer chose, best first; a dense layer's is 0
    weights_LBK: Tensor  # float32


class Decoder:
    """A model's weights as decoding reads them: matrices in `dtype`, by default that of `decoding_dtype`.

    It doesn't follow later changes of the model.
    """

    def __init__(self, model: GPT, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or decoding_dtype()
        self.pieces, self._route = model.vocab_size, (model.settings.n_layers, model.settings.top_k)
        self._kept: list[Tensor] = []  # what C holds pointers to
        s = model.settings
        rank, hidden = s.d_embed or s.d_model, s.expert_width if s.n_experts > 1 else s.d_ff
        self._layers = (_Layer * s.n_layers)(*(self._layer(layer) for layer in model.layers))  # type: ignore[arg-type]
        counts = (s.n_layers, s.d_model, s.n_heads, rank, self.pieces, s.n_experts, s.top_k, hidden, s.max_length)
        number, gated = ACTIVATIONS[s.activation]
        proj = _weight(model.embed.proj)
        self._network = _Network(
            *(*counts, number, gated, s.normalize_top_k, s.embed_norm, NORM_EPS, s.embed_scale),
            *(self._as_is(_weight(model.embed.tokens)), self._as_is(_weight(model.embed.positions))),
            *(self._as_is(model.cos), self._as_is(model.sin)),
            *(self._matrix(proj), self._matrix(model.table), self._as_is(model.norm.weight)),
            ctypes.cast(self._layers, ctypes.c_void_p),
        )

    def _as_is(self, weight: Tensor | None) -> ctypes.c_void_p:
        kept = None if weight is None else weight.detach().contiguous()
        self._kept += [] if kept is None else [kept]
        return address(kept)

    def _matrix(self, weight: Tensor | None) -> ctypes.c_void_p:
        return self._as_is(None if weight is None else weight.detach().to(self.dtype))

    def _layer(self, layer: DecoderLayer) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = map(
            _weight, (layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm)
        )
        products = [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)]
        router = (mlp.gate.weight, mlp.gate.bias) if isinstance(mlp, MoE) else (None, None)
        return _Layer(*map(self._as_is, (*norms, *router)), *map(self._matrix, (*products, *_feed_forward(mlp))))

    def logits(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """Return the logits of the tokens that follow `ids_B`, (B, V) float32, and enter those into the cache.

        The cache has been through the model once, holds no padding, and has room.
        """
        return self.decode(ids_B, cache).logits_BV

    def decode(self, ids_B: Tensor, cache: KVCache) -> Decoded:
        """Return the logits as `logits` does, and the experts that computed them."""
        assert cache.segments is None and 0 < cache.length < cache.max_length
        for entry, (keys, values) in zip(self._layers, cache.stores(), strict=True):
            entry.keys, entry.values = address(keys), address(values)
        ids_B = ids_B.contiguous()
        n_layers, top_k = self._route
        shape = (n_layers, ids_B.shape[0], top_k)
        made = Decoded(
            torch.empty(ids_B.shape[0], self.pieces), torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        )
        batch, position = ctypes.c_int64(ids_B.shape[0]), ctypes.c_int64(cache.length)
        network = ctypes.byref(self._network)
        library(self.dtype).decode(network, address(ids_B), batch, position, *map(address, made), threads())
        cache.length += 1
        return made


def _weight(module: torch.nn.Module | None) -> Tensor | None:
    return None if module is None else module.weight  # type: ignore[return-value]


def _feed_forward(mlp: MoE | FeedForward) -> Iterator[Tensor | None]:
    """Yield the matrices up, gate and down; a dense layer's are those of a single expert."""
    owner = mlp.experts if isinstance(mlp, MoE) else mlp
    for item in (owner.up_proj, owner.gate_proj, owner.down_proj):
        yield item.weight if isinstance(item, torch.nn.Linear) else item
