"""How ranks divide a run: sizes, parts, rows. What they then make of it is tests/faults/test_ranks_alike.py's."""

import pytest
import torch

from moelet.errors import UserError
from moelet.hparams import make_hparams
from moelet.parallel.layout import Layout, Sizes, sizes_for
from moelet.parallel.ranks import Team
from moelet.parallel.rows import shares
from moelet.sections import ModelSettings, ParallelSettings


def test_sizes_that_do_not_fit_name_those_that_do() -> None:
    model = ModelSettings(n_experts=8, d_ff=64)
    assert sizes_for(ParallelSettings(), model, 4) == (4, 1, 1)
    assert sizes_for(ParallelSettings(shard=2, expert=2), model, 8) == (2, 2, 2)
    with pytest.raises(
        UserError, match=r"there are 3 ranks.*multiple of 2 .*set them to one of 3, 1 and 1, 1, 3 and 1\."
    ):
        sizes_for(ParallelSettings(expert=2), model, 3)
    with pytest.raises(UserError, match=r"there is 1 process.*torchrun --nproc-per-node 2"):
        sizes_for(ParallelSettings(expert=2), model, 1)
    with pytest.raises(UserError, match=r"Set parallel.expert to one of 1, 2, 4, 8"):
        sizes_for(ParallelSettings(expert=3), model, 3)


def test_parts_are_stretches_that_make_the_whole() -> None:
    for sizes in (Sizes(1, 3, 1), Sizes(2, 2, 2), Sizes(1, 4, 2), Sizes(1, 1, 8)):
        world = sizes.data * sizes.shard * sizes.expert
        for name, rows in (("embed.tokens.weight", 10), ("layers.0.mlp.experts.up_proj", 8), ("norm.weight", 1)):
            seen: list[int] = []
            for rank in range(world):
                layout = Layout(Team(rank, world), sizes)
                part = layout.part(name, rows)
                local_rows = torch.empty(rows // (sizes.expert if "experts" in name else 1), 2)
                if layout.place(name, local_rows) is not None:
                    seen += range(part.start, part.stop)
            assert sorted(seen) == list(range(rows))


def test_every_rank_has_as_many_rows() -> None:
    hparams = make_hparams({"train": {"train_steps": 1, "batch_size": 5, "global_batch_size": 7}})
    batches = [type("B", (), {"labels": torch.zeros(n, 4)})() for n in hparams.micro_batches]
    assert shares(batches, 2) == [3, 1]
