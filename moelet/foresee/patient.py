"""Who `moelet doctor` looks at: settings, the device they choose, and the same model in small; and what it finds."""

import copy
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from moelet.data import Batch
from moelet.hparams import Hparams, make_hparams
from moelet.modelling import GPT
from moelet.precision import choose_device, choose_dtype
from moelet.state import Training, build
from moelet.tokenizer import Tokenizer

OK, NOTE, FAULT = "ok", "note", "fault"
TEXT = "\n".join(f"def square_{i}(value): return value * value + {i}" for i in range(400))
PIECES = 300
WIDTH, LENGTH, LAYERS, EXPERTS = 64, 64, 2, 8  # of the model in small; its widths are what kernels take
ROWS = 3


class Finding(NamedTuple):
    """One line of the result. `remedy` says what to do, where there is something."""

    check: str
    state: str
    told: str
    remedy: str | None = None


def numbers(seed: int, *shape: int, device: torch.device | None = None) -> Tensor:
    """Return normal numbers that only the seed decides, to be differentiated by."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(device or "cpu").requires_grad_()


class Patient:
    """The settings under test. What depends on the device is made when first asked for, as it may not be there."""

    def __init__(self, hparams: Hparams) -> None:
        self.hparams = hparams

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self.hparams.train.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        return choose_dtype(self.hparams.train.precision, self.device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.train([TEXT], PIECES)

    @cached_property
    def small(self) -> Hparams:
        """The settings with a model of a few thousand parameters that has all the same parts."""
        settings = copy.deepcopy(self.hparams.model_dump(mode="json"))
        model = settings["model"]
        n_experts = min(model["n_experts"], EXPERTS)
        model |= {
            "vocab_size": None,
            "max_length": min(model["max_length"], LENGTH),
            "d_model": WIDTH,
            "n_heads": 2,
            "n_layers": min(model["n_layers"], LAYERS),
            "n_experts": n_experts,
            "top_k": min(model["top_k"], n_experts),
            "d_ff": WIDTH // 2 * n_experts,
            "d_embed": None if model["d_embed"] is None else WIDTH // 2,
            "shared_expert": WIDTH // 2 if model["shared_expert"] else 0,
            "bigram_rows": min(model["bigram_rows"], LENGTH),
        }
        settings["train"] |= {
            "batch_size": ROWS,
            **{"gradient_accumulation": 1, "global_batch_size": None, "memory_limit_gb": None},
            **{"train_steps": 100, "train_tokens": None, "time_budget": None, "checkpoint_activations": False},
        }
        settings["tokenizer"]["file"] = None
        settings["data"] |= {"source": "embedded", "files": None, "mix": None}
        return make_hparams(settings, "the settings in small")

    def training(self, **changes: dict[str, object]) -> Training:
        """Return a run of the small model at its first step, with changes to sections of its settings."""
        settings = self.small.model_dump(mode="json")
        for section, values in changes.items():
            settings[section] |= values
        return build(make_hparams(settings, "the settings in small"), self.tokenizer)

    def model(self) -> GPT:
        """Return the small model, to be evaluated, with weights of usual sizes: at its start parts may be all 0."""
        model = self.training().model.eval()
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=draw).to(parameter.device)
                parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
        return model

    def ids(self, seed: int, rows: int = ROWS) -> Tensor:
        """Return rows of random tokens, (rows, max_length), on the host."""
        draw = torch.Generator().manual_seed(seed)
        shape = (rows, self.small.model.max_length)
        return torch.randint(Tokenizer.pad_id + 1, self.tokenizer.vocab_size, shape, generator=draw)

    def batch(self, seed: int) -> Batch:
        ids = self.ids(seed)
        return Batch(ids, ids.roll(-1, 1), None)
