"""The network: a decoder-only transformer whose feed-forward layers are mixtures of experts.

It returns hidden states and router statistics; the loss takes the tied table and never needs all logits at once.
Parameter names follow Hugging Face's Mixture-of-Experts models, so that export is a table of names.

Shapes: B batch, S sequence, T = B*S tokens, D model, R embedding rank, H heads, L keys, C head width, V vocabulary.

The law of initialisation. Every matrix and table is normal with mean 0, and:

    tensor                                 std                          why
    embed.tokens, embed.positions, lm_head INIT_STD                     logits start near 0: the first loss is ln V
    embed.proj, q, k, v, up and gate_proj  1 / sqrt(d_model)            outputs keep the unit scale of the norm
    o_proj, down_proj                      INIT_STD / sqrt(2*n_layers)  branches add little at first (GPT-2)
    mlp.gate, the router                   INIT_STD                     near-uniform routing
    norms                                  1

With `zero_init` o_proj and down_proj are 0: each layer begins as the identity. Bigrams begin at 0, learned shares as
SHARES says.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from moelet.attention import causal_attention
from moelet.errors import UserError
from moelet.experts import GATED
from moelet.kv_cache import KVCache
from moelet.moe import FeedForward, MoE, Router, RouterStats
from moelet.norm import add_norm
from moelet.rotary import Turns, prepare_heads, turns
from moelet.sections import ModelSettings

INIT_STD = 0.02  # GPT-2's
NORM_EPS = 1e-6  # as in the Hugging Face models we export to
SMEAR_WIDTH = 12  # modded-nanogpt's
HASH = (2_654_435_761, 40_503, 2**31 - 1)  # Knuth's multipliers, The Art of Computer Programming 6.4; a prime
SHARES = {"value_share": 0.5, "embed_share": 0.0, "smear.share": 0.0}  # at first


class Output(NamedTuple):
    hidden: Tensor  # (B, S, D), after the final norm
    router: list[RouterStats]  # one per MoE layer; empty for a dense model


def positions_within(segments_BL: Tensor) -> Tensor:
    """Return how many tokens of its segment stand before each token, (B, L).

    Segments 0 0 1 1 1 2 2 give 0 1 0 1 2 0 1: the index less that of the last change.
    """
    index_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    starts_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    starts_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    return index_L - (index_L * starts_BL).cummax(1).values


class Embedding(nn.Module):
    """Vectors of tokens and learned positions, (B, S) -> (B, S, D), and the output side of table and projection."""

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        rank = settings.d_embed or settings.d_model
        self.scale, self.normed = settings.embed_scale, settings.embed_norm
        self.tokens = nn.Embedding(vocab_size, rank)
        learned = settings.positions == "learned"
        self.positions = nn.Embedding(settings.max_length, settings.d_model) if learned else None
        self.proj = nn.Linear(rank, settings.d_model, bias=False) if settings.d_embed else None

    def forward(self, ids_BS: Tensor, positions_BS: Tensor) -> Tensor:
        x_BSR = self.tokens(ids_BS)
        x_BSD = x_BSR if self.proj is None else self.proj(x_BSR)
        if self.normed:
            x_BSD = F.rms_norm(x_BSD, x_BSD.shape[-1:], eps=NORM_EPS)
        x_BSD = x_BSD * self.scale
        return x_BSD if self.positions is None else x_BSD + self.positions(positions_BS)

    def rank(self, hidden_BSD: Tensor) -> Tensor:
        """Return the final hidden states in the space of the token table, (B, S, R): the projection, transposed."""
        return hidden_BSD if self.proj is None else F.linear(hidden_BSD, self.proj.weight.T)


class Smear(nn.Module):
    """Each token's vector, and a share of the one before it by a gate: (B, S, D) -> (B, S, D).

    Within a segment only. The gate reads the first few numbers. Source: modded-nanogpt's "smear".
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.width = min(SMEAR_WIDTH, settings.d_model)
        self.gate = nn.Linear(self.width, 1, bias=False)
        self.share = nn.Parameter(torch.empty(1))

    def forward(self, x_BSD: Tensor, positions_BS: Tensor, cache: KVCache | None) -> Tensor:
        before_BSD = F.pad(x_BSD, (0, 0, 1, -1)) if cache is None else cache.before("vector", x_BSD)
        gate_BS1 = self.gate(x_BSD[..., : self.width]).sigmoid() * (positions_BS > 0)[..., None]
        return x_BSD + self.share * gate_BS1 * before_BSD


class Bigrams(nn.Module):
    """A vector for each token with the one before it, (B, S) -> (B, S, D), from a table that pairs share by their hash.

    Within a segment only: its first token's is row 0. Source: modded-nanogpt's "bigram hash embedding".
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.table = nn.Embedding(settings.bigram_rows, settings.d_model)

    def forward(self, ids_BS: Tensor, positions_BS: Tensor, cache: KVCache | None) -> Tensor:
        before_BS = F.pad(ids_BS, (1, -1)) if cache is None else cache.before("id", ids_BS)
        hashed_BS = (before_BS * HASH[0] + ids_BS * HASH[1]) % HASH[2] % (self.table.num_embeddings - 1) + 1
        return self.table(hashed_BS * (positions_BS > 0))


class Place(NamedTuple):
    """Where the tokens of a pass stand, and what they may see; the same for all layers."""

    positions_BS: Tensor  # within their segments
    real_T: Tensor | None  # which tokens aren't padding; None: all
    segments_BL: Tensor | None
    angles: Turns | None  # for rotary positions
    cache: KVCache | None


class Attention(nn.Module):
    """Multi-head causal self-attention without biases."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        width = settings.d_model
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        normed = settings.qk_norm
        self.q_norm = nn.RMSNorm(settings.head_width, eps=NORM_EPS) if normed else None
        self.k_norm = nn.RMSNorm(settings.head_width, eps=NORM_EPS) if normed else None
        mixes = settings.value_residual and layer > 0
        self.value_share = nn.Parameter(torch.empty(1)) if mixes else None
        self.layer, self.head_width = layer, settings.head_width
        self.dropout, self.backend = settings.dropout, settings.attention

    def _heads(self, x_BSD: Tensor, norm: nn.RMSNorm | None, place: Place) -> Tensor:
        """(B, S, H*C) -> (B, H, S, C), ready to meet: split into heads, norm, turn, bring the heads forward."""
        x_BSHC, weight = x_BSD.unflatten(-1, (-1, self.head_width)), None if norm is None else norm.weight
        return prepare_heads(x_BSHC, weight, NORM_EPS, place.angles, place.positions_BS).transpose(1, 2)

    def forward(self, x_BSD: Tensor, first_BSD: Tensor | None, place: Place) -> tuple[Tensor, Tensor]:
        """Return the branch and its values before heads; `first_BSD` are the first layer's, to be mixed in."""
        q_BHSC = self._heads(self.q_proj(x_BSD), self.q_norm, place)
        k_BHLC, values_BSD = self._heads(self.k_proj(x_BSD), self.k_norm, place), self.v_proj(x_BSD)
        if self.value_share is not None and first_BSD is not None:  # Zhou et al. 2024, "Value residual learning"
            values_BSD = values_BSD.lerp(first_BSD, self.value_share.to(values_BSD.dtype))
        v_BHLC = values_BSD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        if place.cache is not None:
            k_BHLC, v_BHLC = place.cache.append(self.layer, k_BHLC, v_BHLC)
        dropout = self.dropout if self.training else 0.0
        out_BHSC = causal_attention(q_BHSC, k_BHLC, v_BHLC, place.segments_BL, dropout, self.backend)
        return self.o_proj(out_BHSC.transpose(1, 2).flatten(2)), values_BSD


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    A branch is added where the next norm is computed, one pass over both: so a layer takes the branch before it and
    returns its last.
    """

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(settings.d_model, eps=NORM_EPS)
        self.self_attn = Attention(settings, layer)
        self.post_attention_layernorm = nn.RMSNorm(settings.d_model, eps=NORM_EPS)
        moe = settings.n_experts > 1
        self.mlp: MoE | FeedForward = MoE(settings) if moe else FeedForward(settings, settings.d_ff)
        sees_embedding = settings.embed_residual and layer > 0
        self.embed_share = nn.Parameter(torch.empty(1)) if sees_embedding else None
        self.dropout = settings.dropout

    def forward(
        self,
        residual_BSD: Tensor | None,
        branch_BSD: Tensor,
        embedded_BSD: Tensor,
        first_BSD: Tensor | None,
        place: Place,
    ) -> tuple[Tensor, Tensor, Tensor, RouterStats | None]:
        """Return the residual stream without the feed-forward branch, that branch, the values of attention, and the
        router's statistics.
        """
        rate = self.dropout if self.training else 0.0
        if self.embed_share is not None and residual_BSD is not None:
            residual_BSD = residual_BSD + self.embed_share * embedded_BSD
        x_BSD, normed_BSD = add_norm(residual_BSD, branch_BSD, self.input_layernorm.weight, NORM_EPS, rate)
        attended_BSD, values_BSD = self.self_attn(normed_BSD, first_BSD, place)
        x_BSD, normed_BSD = add_norm(x_BSD, attended_BSD, self.post_attention_layernorm.weight, NORM_EPS, rate)
        y_TD, stats = self.mlp(normed_BSD.flatten(0, 1), place.real_T)
        return x_BSD, y_TD.view_as(x_BSD), values_BSD, stats


class GPT(nn.Module):
    """The whole network, for a tokenizer of `vocab_size` pieces.

    Raises UserError when `settings.vocab_size` is set and too small for the tokenizer.
    """

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        if settings.vocab_size is not None and settings.vocab_size < vocab_size:
            raise UserError(
                f"model.vocab_size is {settings.vocab_size} and the tokenizer has {vocab_size} pieces. Every piece "
                "needs a row. Set model.vocab_size to null, which takes the tokenizer's."
            )
        self.n_pieces = vocab_size  # ids from here on have a row and no text
        vocab_size = settings.vocab_size or vocab_size
        self.settings, self.vocab_size = settings, vocab_size
        self.embed = Embedding(settings, vocab_size)
        self.bigrams = Bigrams(settings) if settings.bigram_rows else None
        self.smear = Smear(settings) if settings.smear else None
        self.layers = nn.ModuleList(DecoderLayer(settings, layer) for layer in range(settings.n_layers))
        self.norm = nn.RMSNorm(settings.d_model, eps=NORM_EPS)
        rank = settings.d_embed or settings.d_model
        self.lm_head = None if settings.tie_embeddings else nn.Linear(rank, vocab_size, bias=False)
        rope = settings.positions == "rope"
        angles = turns(settings.max_length, settings.head_width, settings.rope_theta) if rope else None
        self.register_buffer("cos", angles and angles.cos, persistent=False)
        self.register_buffer("sin", angles and angles.sin, persistent=False)
        self.checkpoint_activations = False  # keep what enters a layer alone, and compute the layer again in backward
        if not self.table.is_meta:
            self.initialise()

    @property
    def table(self) -> Tensor:
        """The output table (V, R): the input embedding itself when tied."""
        return self.embed.tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids_BS: Tensor, segments_BS: Tensor | None = None, cache: KVCache | None = None) -> Output:
        """Return the final hidden states and each layer's router statistics.

        `segments_BS` numbers the documents of each row 1, 2, ..., with 0 on padding; None, or a mask of the real
        tokens, means one document a row. Attention stays within a segment, positions restart at each, and padding is
        not in the statistics. With a cache, `ids_BS` are the tokens after those it holds. Raises ValueError past
        max_length.
        """
        start, n_new = 0 if cache is None else cache.length, ids_BS.shape[1]
        if start + n_new > self.settings.max_length:
            raise ValueError(f"{start + n_new} tokens don't fit the context of {self.settings.max_length}. Cut them.")
        place = self._place(ids_BS, segments_BS, cache)
        embedded_BSD = self.embed(ids_BS, place.positions_BS)
        if self.bigrams is not None:
            embedded_BSD = embedded_BSD + self.bigrams(ids_BS, place.positions_BS, cache)
        if self.smear is not None:
            embedded_BSD = self.smear(embedded_BSD, place.positions_BS, cache)
        x_BSD, branch_BSD, first_BSD, router = None, embedded_BSD, None, []
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for layer in self.layers:
            run = partial(checkpoint, layer, use_reentrant=False) if again else layer
            x_BSD, branch_BSD, values_BSD, stats = run(x_BSD, branch_BSD, embedded_BSD, first_BSD, place)
            first_BSD = values_BSD if first_BSD is None else first_BSD
            router += [] if stats is None else [stats]
        if cache is not None:
            cache.length += n_new
        rate = self.settings.dropout if self.training else 0.0
        return Output(add_norm(x_BSD, branch_BSD, self.norm.weight, NORM_EPS, rate)[1], router)

    def _place(self, ids_BS: Tensor, segments_BS: Tensor | None, cache: KVCache | None) -> Place:
        (batch, n_new), device = ids_BS.shape, ids_BS.device
        start = 0 if cache is None else cache.length
        real_T = None if segments_BS is None else (segments_BS != 0).flatten()
        segments_BL = segments_BS if cache is None else cache.note_segments(segments_BS, batch, n_new, device)
        if segments_BL is None:
            positions_BS = torch.arange(start, start + n_new, device=device).expand(batch, n_new)
        else:
            positions_BS = positions_within(segments_BL)[:, start:]
        angles = None if self.cos is None or self.sin is None else Turns(self.cos, self.sin)
        return Place(positions_BS, real_T, segments_BL, angles, cache)

    def features(self, hidden_BSD: Tensor) -> Tensor:
        """Return what the output table is multiplied with: (B, S, R)."""
        return self.embed.rank(hidden_BSD)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Return the logits (B, S, V), float32 or better; for a few positions, training uses `loss` instead."""
        logits_BSV = F.linear(self.features(hidden_BSD), self.table)
        return logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))

    def initialise(self) -> None:
        """Set every parameter by the law at the top of this file, from torch's global generator."""
        for name, parameter in self.named_parameters():
            self.draw(name, parameter)

    @torch.no_grad()
    def draw(self, name: str, parameter: Tensor) -> None:
        """Set what is, or will be, parameter `name` of this network, whole."""
        into_residual = 0.0 if self.settings.zero_init else INIT_STD / math.sqrt(2 * self.settings.n_layers)
        if name.endswith(tuple(SHARES)):
            parameter.fill_(next(share for ending, share in SHARES.items() if name.endswith(ending)))
        elif name in ("smear.gate.weight", "bigrams.table.weight"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
            parameter.normal_(0.0, into_residual)
        elif "_proj" in name or name == "embed.proj.weight":
            parameter.normal_(0.0, self.settings.d_model**-0.5)
        else:
            parameter.normal_(0.0, INIT_STD)

    @torch.no_grad()
    def set_constants(self) -> None:
        """Set what isn't learned as at first: the turns of rotary positions, the routers' biases."""
        if self.cos is not None and self.sin is not None:
            angles = turns(self.settings.max_length, self.settings.head_width, self.settings.rope_theta)
            self.cos.copy_(angles.cos)
            self.sin.copy_(angles.sin)
        for module in self.modules():
            if isinstance(module, Router) and module.bias is not None:
                module.bias.zero_()

    def flops_per_token(self, length: int) -> int:
        """Return the floating-point operations of training on one token in rows of `length`.

        Matrix products of forward and backward (3x forward), causal attention at half of the full square, only the
        experts that a token uses. Source: the usual 2 x parameters a product, as in PaLM's appendix B.
        """
        s = self.settings
        rank = s.d_embed or s.d_model
        matrices = 3 if s.activation in GATED else 2
        used = s.top_k * s.expert_width + s.shared_expert if s.n_experts > 1 else s.d_ff
        router = s.d_model * s.n_experts if s.n_experts > 1 else 0
        layer = 4 * s.d_model**2 + length * s.d_model + matrices * s.d_model * used + router
        projections = 2 * s.d_model * rank if s.d_embed else 0
        return 3 * 2 * (s.n_layers * layer + projections + rank * self.vocab_size)


# what sets a new tensor in torch's layers, and how it draws numbers, if it does
FILLING = {"normal_": "normal_", "uniform_": "uniform_", "kaiming_uniform_": "uniform_", "zero_": "", "fill_": ""}


class _Unset(TorchFunctionMode):
    """Leaves new tensors unset: drawing numbers for tensors without any would load torch's compiler, for seconds."""

    def __init__(self, draws: bool = False) -> None:
        """`draws`: the generator is left as if numbers had been drawn."""
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) not in FILLING:
            return func(*args, **(kwargs or {}))
        tensor = args[0] if args else (kwargs or {})["tensor"]
        if self.draws and FILLING[name]:
            getattr(torch.empty(tensor.shape, device="cpu"), FILLING[name])()
        return tensor


def without_numbers(settings: ModelSettings, vocab_size: int) -> GPT:
    """Return a network on the meta device, which takes no memory; the generator is where GPT() would have left it
    before `initialise`."""
    with torch.device("meta"), _Unset(draws=True):
        return GPT(settings, vocab_size)


def shapes_of(settings: ModelSettings, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the network, without taking the memory or the time that its size would."""
    with torch.device("meta"), _Unset():
        few = GPT(settings.model_copy(update={"n_layers": min(2, settings.n_layers)}), vocab_size).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in few.items()}
    second = {name.removeprefix("layers.1."): shape for name, shape in shapes.items() if name.startswith("layers.1.")}
    more = range(2, settings.n_layers)  # from the second on, layers are alike
    return shapes | {f"layers.{layer}.{name}": shape for layer in more for name, shape in second.items()}
