"""Tied and folded tables through export and back, for any shape: the same logits, the same bits, one storage."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinySettings
from scorecard import Trials
from test_export import ROPE, load, make_run, our_tensor, write_folder, written  # beside tests/conftest.py

from moelet.export.gguf import write
from moelet.export.importing import import_hf
from moelet.export.names import folded, hf_weights
from moelet.tokenizer import Tokenizer


def any_shape(trials: Trials) -> dict[str, Any]:
    """Return the model's settings: of any widths, heads and experts, its tables factorised, tied, scaled or none."""
    pick = trials.random.choice
    heads, experts = pick([1, 2, 3, 4]), pick([1, 2, 5, 8])
    return {
        **ROPE, "n_heads": heads, "d_model": heads * pick([2, 8, 10]), "d_embed": pick([None, 3, 16]),
        "embed_scale": pick([1.0, 0.3, 30.0]), "embed_norm": pick([False, True]), "tie_embeddings": pick([True, False]),
        "rope_theta": pick([100.0, 10_000.0]), "n_layers": pick([1, 3]), "n_experts": experts,
        "top_k": trials.random.randint(1, experts), "d_ff": experts * pick([1, 6, 16]),
        "normalize_top_k": pick([True, False]), "vocab_size": pick([None, 407]),
    }  # fmt: skip


@pytest.mark.check(26)
@torch.no_grad()
def test_any_shape_there_and_back(
    trials: Trials, tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Exported and imported again, a model of any widths computes the same; tied tables stay one storage."""
    pytest.importorskip("gguf")
    ids = torch.randint(4, 400, (2, 32), generator=torch.Generator().manual_seed(0))
    for index in range(trials.count(small=8, full=100)):
        shape, place = any_shape(trials), tmp_path / str(index)
        with trials.one(json.dumps(shape)):
            place.mkdir()
            settings = tiny_settings(model=shape)
            model = load(make_run(place / "run", settings, tokenizer)).model
            plain = folded(model)
            exact = copy.deepcopy(model).double()  # norms of two numbers would enlarge what float32 rounds
            ours, theirs = (each.logits(each(ids).hidden) for each in (exact, folded(exact)))
            assert theirs.dtype == torch.float64 and (ours - theirs).abs().max() < 1e-6
            tied = shape["tie_embeddings"] and not shape["embed_norm"]
            assert ("lm_head.weight" not in hf_weights(plain)) == tied
            write(place / "x.gguf", plain, tokenizer, "f32", "x")
            _, tensors = written(place / "x.gguf")
            assert len(tensors) == len(plain.state_dict())
            for name, stored in tensors.items():
                assert stored.data.tobytes() == our_tensor(plain, name).numpy().tobytes()
            (place / "tiny.json").write_text(json.dumps(tiny_settings()))
            import_hf(write_folder(place / "hf", model, tokenizer, False), place / "again", place / "tiny.json")
            again = load(place / "again").model
            assert (again.table.data_ptr() == again.embed.tokens.weight.data_ptr()) == tied
            assert torch.equal(again.logits(again(ids).hidden), plain.logits(plain(ids).hidden))
