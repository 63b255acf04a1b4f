"""The sections of the settings: what each setting is called, what it may be, what it means.

Frozen and strict. Derived values are properties and are never written back; `null` means off or "derive it". How they
stand together in a file, and what is said of a wrong one, is `moelet.hparams`'.
"""

import hashlib
import json
import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# no model is larger, and past these even its description takes the machine's memory and time
MOST_LAYERS, MOST_HEADS, MOST_EXPERTS, WIDEST, LONGEST, MOST_ROWS = 2**10, 2**12, 2**14, 2**22, 2**20, 2**26
MOST_SEQUENCES = 2**20  # of a step
MOST_RANKS = 2**20

READING = {"reader_patience", "bad_rows"}  # what is done about failures in reading: it changes no text
LENGTHS = ("train_steps", "train_tokens", "time_budget")  # three ways to say how long a run is
LATER = {  # settings that the first runs' fingerprints don't know
    *("embed_norm", "positions", "rope_theta", "qk_norm", "shared_expert", "selection_bias", "zero_init"),
    *("embed_residual", "value_residual", "smear", "bigram_rows", "router_lr", "muon_lr", "muon_every"),
    *("z_loss", "bias_rate"),
}


class Section(BaseModel):
    """What all sections share: unknown keys are errors, nothing is coerced, nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @property
    def unsaid(self) -> set[str]:
        """The LATER settings at their defaults: no fingerprint has them, so that runs from before them go on."""
        fields = type(self).model_fields
        return {name for name in LATER & set(fields) if getattr(self, name) == fields[name].default}


class ModelSettings(Section):
    """The shape of the network. The defaults are the reference architecture."""

    vocab_size: int | None = Field(None, ge=4, le=MOST_ROWS, description="rows of the embedding; null: the tokenizer's")
    max_length: int = Field(512, ge=2, le=LONGEST, description="context, in tokens")
    d_model: int = Field(512, ge=1, le=WIDEST, description="width of the residual stream")
    d_embed: int | None = Field(
        128, ge=1, le=WIDEST, description="width of the token embedding; null: d_model, no projection"
    )
    embed_scale: float = Field(1.0, gt=0, description="factor on the embedding at the input, not at the tied output")
    embed_norm: bool = Field(False, description="bring each token's vector to unit scale before embed_scale")
    positions: Literal["learned", "rope"] = Field(
        "learned", description="learned: a vector for each place; rope: queries and keys are turned by it"
    )
    rope_theta: float = Field(10_000.0, gt=1, description="for rope: the slowest turn takes 2 pi theta tokens")
    n_layers: int = Field(4, ge=1, le=MOST_LAYERS, description="attention and experts, so many times")
    n_heads: int = Field(8, ge=1, le=MOST_HEADS, description="attention heads, which share d_model evenly")
    qk_norm: bool = Field(False, description="an RMS norm over each head of queries and keys")
    d_ff: int = Field(
        2048, ge=1, le=WIDEST, description="width of all experts of a layer together, which share it evenly"
    )
    n_experts: int = Field(8, ge=1, le=MOST_EXPERTS, description="experts a layer; 1 is a dense feed-forward layer")
    top_k: int = Field(2, ge=1, description="experts that each token uses")
    shared_expert: int = Field(
        0, ge=0, le=WIDEST, description="width of an expert that every token uses besides; 0: none"
    )
    router: str = Field("softmax", description="how scores become a choice of experts and their weights: moe.ROUTERS")
    normalize_top_k: bool = Field(False, description="scale the chosen weights of a token to sum to 1")
    selection_bias: bool = Field(False, description="choose experts by score plus bias, moved by balance.bias_rate")
    activation: str = Field(
        "silu", description="within experts; swiglu has a gate, a third matrix: experts.ACTIVATIONS"
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="share dropped of embeddings, attention weights and what branches add"
    )
    tie_embeddings: bool = Field(True, description="one embedding and projection for input and output")
    zero_init: bool = Field(False, description="what attention and experts add to the stream starts at 0")
    embed_residual: bool = Field(False, description="each layer sees the embedding again, by a learned share")
    value_residual: bool = Field(False, description="mix the first layer's values into the others', by a learned share")
    smear: bool = Field(False, description="mix the token before into each, by a learned gate")
    bigram_rows: int = Field(
        0, ge=0, le=MOST_ROWS, description="rows of a table with a vector for each pair of tokens, by a hash; 0: none"
    )
    attention: str = Field(
        "auto", description="which code computes it; auto: the fastest that can: attention.ATTENTION"
    )
    experts: str = Field("auto", description="which code computes them; auto: the fastest that can: experts.BACKENDS")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.d_model % self.n_heads:
            below = max(h for h in range(1, self.n_heads + 1) if self.d_model % h == 0)
            raise ValueError(
                f"d_model is {self.d_model} and n_heads is {self.n_heads}. The heads share d_model evenly. "
                f"Set model.n_heads to {below}, or model.d_model to a multiple of {self.n_heads}."
            )
        if self.d_ff % self.n_experts:
            raise ValueError(
                f"d_ff is {self.d_ff} and n_experts is {self.n_experts}. The experts share d_ff evenly. "
                f"Set model.d_ff to {math.ceil(self.d_ff / self.n_experts) * self.n_experts}."
            )
        if self.top_k > self.n_experts:
            raise ValueError(
                f"top_k is {self.top_k} and n_experts is {self.n_experts}. A token can't use more experts than there "
                f"are. Set model.top_k to at most {self.n_experts}."
            )
        if self.bigram_rows == 1:
            raise ValueError("bigram_rows is 1, and one row is kept for first tokens. Set model.bigram_rows to 0 or 2.")
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"positions is rope and a head is {self.head_width} wide (d_model {self.d_model}, n_heads "
                f"{self.n_heads}). Rope turns pairs of numbers. Set model.n_heads so that d_model / n_heads is even."
            )
        if self.n_experts == 1 and (self.shared_expert or self.selection_bias):
            name = "shared_expert" if self.shared_expert else "selection_bias"
            raise ValueError(
                f"n_experts is 1 and {name} is set. A dense model routes nothing. Set model.{name} to "
                f"{'0' if self.shared_expert else 'false'}."
            )
        return self

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_heads

    @property
    def expert_width(self) -> int:
        return self.d_ff // self.n_experts

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that changes what the weights compute, in hexadecimal."""
        settings = self.model_dump(mode="json", exclude={"attention", "experts", "dropout", *self.unsaid})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class TokenizerSettings(Section):
    file: str | None = Field(None, description="a SentencePiece model; null: train one on the run's own text")
    vocab_size: int = Field(4096, ge=260, description="pieces to train, the 256 bytes and 4 control pieces included")
    algorithm: Literal["bpe", "unigram"] = Field(
        "bpe", description="how pieces are found; bpe is what llama.cpp carries exactly"
    )
    sample_bytes: int = Field(10_000_000, ge=1, description="text that the tokenizer is trained on, in bytes")


class SourceSettings(Section):
    """Where text comes from. Which of these count depends on `source`."""

    source: str = Field("embedded", description="which kind of place text comes from: sources.SOURCES")
    files: str | list[str] | None = Field(None, description="for source files: paths, globs or folders of text or rows")
    dataset: str | None = Field(None, description="for source hub: repository or local folder of a dataset")
    name: str | None = Field(None, description="for source hub: the dataset's configuration (not its split)")
    split: str = Field("train", description="for source hub: the split")
    revision: str | None = Field(None, description="for source hub: branch, tag or commit; a run notes the commit")
    text_field: str = Field("text", description="the field that holds the text, in .jsonl, .parquet and hub rows")

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> Self:
        if self.source == "files" and not self.files:
            raise ValueError('source is "files" and files is null. Set data.files to a path, a glob or a list of them.')
        if self.source == "prepared" and not self.files:
            raise ValueError('source is "prepared" and files is null. Set data.files to what `moelet prepare` wrote.')
        if self.source == "hub" and not self.dataset:
            raise ValueError('source is "hub" and dataset is null. Set data.dataset, such as "Zyphra/Zyda-2".')
        return self


class MixedSource(SourceSettings):
    """One source of a mix."""

    weight: float = Field(1.0, gt=0, description="its share of the mix, relative to the other weights")


class DataSettings(SourceSettings):
    mix: list[MixedSource] | None = Field(None, description="for source mix: sources, each with its weight")
    mix_unit: Literal["documents", "characters"] = Field(
        "documents", description="for source mix: what the weights are shares of"
    )
    shuffle_window: int = Field(4096, ge=1, description="pieces of text read, and their rows shuffled, together")
    piece_chars: int = Field(8192, ge=16, description="longest piece of a document; pieces are what is held out")
    packing: bool = Field(True, description="fill every row with documents end to end; false: one padded piece a row")
    mask_documents: bool = Field(False, description="no attention across documents in a packed row; positions restart")
    validation_fraction: float = Field(0.05, gt=0, lt=1, description="share of the text held out, chosen by its hash")
    bad_rows: float = Field(0.01, ge=0, le=1, description="share of rows of no use at which to stop; not empty ones")
    reader_patience: float = Field(300.0, gt=0, description="seconds without a sign of life: reading begins anew")

    @model_validator(mode="after")
    def _mix_has_sources(self) -> Self:
        if self.source == "mix" and not self.mix:
            raise ValueError(
                'source is "mix" and mix is empty. Set data.mix to a list of sources, such as '
                '[{"source": "files", "files": "a.txt", "weight": 2}, {"source": "embedded", "weight": 1}].'
            )
        if any(part.source == "mix" for part in self.mix or []):
            raise ValueError('a source of data.mix is a "mix" itself. Put its sources into data.mix.')
        if any(part.source == "prepared" for part in self.mix or []):
            raise ValueError('a source of data.mix is "prepared". Mix texts, and prepare the mix as a whole.')
        return self

    @model_validator(mode="after")
    def _masks_what_is_packed(self) -> Self:
        if self.mask_documents and not self.packing:
            raise ValueError(
                "mask_documents is true and packing is false. Masking needs rows of several documents, and unpacked "
                "rows hold one each. Set data.packing to true, or data.mask_documents to false."
            )
        return self

    @property
    def parts(self) -> list[MixedSource]:
        """The sources that a mix draws from; none where the source is another."""
        return (self.mix or []) if self.source == "mix" else []


class OptimSettings(Section):
    optimizer: str = Field(
        "adamw", description="muon: for the layers' matrices, with adamw for the rest: optim.OPTIMIZERS"
    )
    lr: float = Field(1e-3, gt=0, description="the highest learning rate, reached when the warm-up ends")
    min_lr: float = Field(1e-4, ge=0, description="the learning rate of the last step")
    embed_lr: float | None = Field(None, gt=0, description="lr of the embedding tables, same schedule; null: lr")
    router_lr: float | None = Field(None, gt=0, description="lr of the routers, same schedule; null: lr")
    muon_lr: float | None = Field(
        None, gt=0, description="for muon: lr of the layers' matrices, same schedule; null: lr"
    )
    muon_every: int = Field(1, ge=1, description="for muon: steps between two updates of a matrix, each so much larger")
    warmup_steps: int = Field(100, ge=0, description="steps from 0 to lr; may be longer than the run")
    schedule: str = Field("cosine", description="how lr comes down to min_lr after the warm-up: optim.SCHEDULES")
    weight_decay: float = Field(0.1, ge=0, description="on matrices; not on norms, embeddings, routers")
    betas: tuple[float, float] = Field((0.9, 0.95), description="how long Adam's two averages remember, each in [0, 1)")
    grad_clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; null: no clipping")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr} and lr is {self.lr}. Set optim.min_lr to at most optim.lr.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {list(self.betas)}. Set both of optim.betas to at least 0 and below 1.")
        return self


class BalanceSettings(Section):
    loss: str | None = Field("switch", description="how uneven loads are made to cost: loss.BALANCE; null: not at all")
    alpha: float = Field(0.01, ge=0, description="weight of the balance loss, averaged over layers")
    z_loss: float = Field(
        0.0, ge=0, description="weight of the mean square of log(sum(exp(router scores))), averaged over layers"
    )
    bias_rate: float | None = Field(None, gt=0, description="what a selection bias moves by in a step; null: no bias")


class ParallelSettings(Section):
    data: Annotated[int, Field(ge=1, le=MOST_RANKS)] | Literal["auto"] = Field(
        "auto", description="copies of the model, each on rows of its own; auto: as many as the ranks give"
    )
    shard: int = Field(
        1, ge=1, le=MOST_RANKS, description="ranks that each copy's matrices and their optimizer are divided among"
    )
    expert: int = Field(1, ge=1, le=MOST_RANKS, description="ranks that each layer's experts are divided among, whole")


class TrainSettings(Section):
    run: str | None = Field(None, description="the run folder; null: runs/<settings file>-<time>")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of initial weights, dropout and the order of the text")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train; auto: on cuda if there")
    batch_size: Annotated[int, Field(ge=1, le=MOST_SEQUENCES)] | Literal["auto"] = Field(
        8, description='sequences a micro-step; "auto": as many as fit in memory, with the same global_batch_size'
    )
    gradient_accumulation: int = Field(
        1, ge=1, le=MOST_SEQUENCES, description="micro-steps an optimizer step; or set global_batch_size"
    )
    global_batch_size: int | None = Field(
        None,
        ge=1,
        le=MOST_SEQUENCES,
        description="sequences an optimizer step, exactly: its last micro-step takes the rest",
    )
    memory_limit_gb: float | None = Field(
        None,
        gt=0,
        description='for batch_size "auto": GiB of the card or process; null: nine tenths of what is free',
    )
    checkpoint_activations: bool = Field(False, description="compute each layer again in backward: memory for time")
    train_steps: int | None = Field(
        None, ge=1, description="length in optimizer steps; or set train_tokens or time_budget"
    )
    train_tokens: int | None = Field(None, ge=1, description="length in tokens, rounded up to whole steps")
    time_budget: float | None = Field(
        None, gt=0, description="length in seconds from start to report, of all sessions together"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of products; auto: bf16 where that is faster, else fp16 on CUDA, fp32 on a CPU"
    )
    spike_deviations: float | None = Field(
        None, gt=0, description="a loss so many deviations above the last 128 is a spike, such as 6; null: none is"
    )
    bad_step: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="for a spike, or numbers that aren't finite: stop; pass the batch over; or go back to the newest "
        "checkpoint too, and on behind that batch",
    )
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; null: at the end only")
    eval_tokens: int = Field(65_536, ge=1, description="held-out tokens of an evaluation, about")
    log_steps: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_steps: int | None = Field(None, ge=1, description="steps between checkpoints; null: at the end only")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints to keep, besides the best")
    on_save_failure: Literal["warn", "pause", "stop"] = Field(
        "warn", description="where a checkpoint can't be written: train on, wait until it can be, or end"
    )
    sample_prompt: str | None = Field("", description="evaluations continue it with a sample; null: no sample")
    track: str | None = Field(None, description="where metrics.jsonl is shown, too: trackers.TRACKERS; null: nowhere")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'none'} of {', '.join(LENGTHS)} "
                f"{'are' if given else 'is'} set. Set exactly one; the others are null."
            )
        return self

    @model_validator(mode="after")
    def _rewinds_to_something(self) -> Self:
        if self.bad_step == "rewind" and self.checkpoint_steps is None:
            raise ValueError(
                "bad_step is rewind and checkpoint_steps is null. A run goes back to a checkpoint. Set "
                "train.checkpoint_steps, such as 500."
            )
        return self

    @model_validator(mode="after")
    def _one_batch(self) -> Self:
        size, whole = self.batch_size, self.global_batch_size
        if size != "auto" and self.memory_limit_gb is not None:
            raise ValueError(
                f"memory_limit_gb is {self.memory_limit_gb:g} and batch_size is {size}. The limit is what a batch "
                'size is looked for in. Set train.batch_size to "auto", or train.memory_limit_gb to null.'
            )
        if whole is None:
            if size == "auto":
                raise ValueError(
                    'batch_size is "auto" and global_batch_size is null. What a step learns from must not depend on '
                    "memory. Set train.global_batch_size to the sequences an optimizer step, such as 32."
                )
            return self
        if self.gradient_accumulation != 1:
            raise ValueError(
                f"gradient_accumulation is {self.gradient_accumulation} and global_batch_size is {whole}. The number "
                "of micro-steps follows from the latter. Set train.gradient_accumulation to 1, or "
                "train.global_batch_size to null."
            )
        if size != "auto" and size > whole:
            raise ValueError(
                f"batch_size is {size} and global_batch_size is {whole}. A micro-step is a part of the step. Set "
                f"train.batch_size to at most {whole}."
            )
        return self
