"""Documents read ahead by threads and cut at random places: each comes once, in the order of a run never cut."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from scorecard import Trials

from moelet import data
from moelet.sections import DataSettings
from moelet.text.documents import Cursor
from moelet.text.prefetch import Reader
from moelet.tokenizer import Tokenizer

COUNT, LENGTH, SEED = 1000, 48, 5
FORMATS = (".jsonl", ".parquet", ".jsonl.zst")


def write_shards(folder: Path, shards: int, ending: str) -> None:
    """Write the documents, one id each, into so many files."""
    folder.mkdir()
    for shard in range(shards):
        texts = [f"id {k:04} says " + "word " * (k % 7) for k in range(shard, COUNT, shards)]
        path = folder / f"{shard}{ending}"
        if ending == ".parquet":
            parquet.write_table(pa.table({"text": texts}), path, row_group_size=37)
            continue
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(pa.compress(lines, "zstd", asbytes=True) if ending.endswith(".zst") else lines)


def ids_in(rows: list[tuple[list[int], Cursor]], tokenizer: Tokenizer, packing: bool) -> list[str]:
    """Return the ids of the documents in rows of whole windows, in the order of the text."""
    windows: dict[tuple[int, int], list[list[int]]] = {}
    for row, cursor in rows:
        windows.setdefault((cursor["epoch"], cursor["window"]), []).append(row)
    found = []
    for (epoch, window), drawn in windows.items():
        order = np.random.default_rng([SEED, epoch, window]).permutation(len(drawn))
        placed = [row for _, row in sorted(zip(order.tolist(), drawn, strict=True))]
        ids = [token for row in placed for token in (row[:-1] if packing else row)]  # packed rows share an id
        found += re.findall(r"id (\d{4}) says", tokenizer.decode(ids))
    return found


@pytest.mark.check(10)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_documents_in_shards_with_the_run_cut_at_random_places(
    trials: Trials, tokenizer: Tokenizer, tmp_path: Path, packing: bool
) -> None:
    """Cut ten times and resumed from the batch trained on last, twice: the same rows in the same order as uncut, each
    document once a pass."""
    draw, every = trials.random, list(itertools.product((1, 3, 7), FORMATS))
    for shards, ending in every if trials.full else [every[4 if packing else 8]]:
        folder = tmp_path / f"{shards}{ending}"
        write_shards(folder, shards, ending)
        given = DataSettings(
            source="files", files=str(folder), shuffle_window=64, packing=packing, validation_fraction=1e-9
        )

        def begin(at: Cursor, given: DataSettings = given) -> Any:
            return data.training_rows(given, tokenizer, LENGTH, SEED, at)

        def read(at: Cursor, count: int, begin: Any = begin) -> list[tuple[list[int], Cursor]]:
            with Reader(begin, at, 4, 60) as reader:
                items = (reader.wait(lambda: False) for _ in range(count))
                return [(item[0].tolist(), json.loads(json.dumps(item[1]))) for item in items if item]

        per_pass = sum(1 for _ in itertools.takewhile(lambda item: item[1]["epoch"] == 0, begin(data.START)))
        whole = read(data.START, per_pass + per_pass // 3)
        with trials.one(f"{shards} shards of {ending}, uncut"):
            ids = ids_in(whole[:per_pass], tokenizer, packing)
            assert Counter(ids) == Counter(f"{k:04}" for k in range(COUNT)) and ids != sorted(ids)
        for again in range(2):
            with trials.one(f"{shards} shards of {ending}, cut, {again}"):
                cuts = sorted(draw.sample(range(1, len(whole)), 10))
                cuts[5] = cuts[4] + 1  # twice in a row
                found: list[tuple[list[int], Cursor]] = []
                for cut in [*cuts, len(whole)]:
                    found += read(found[-1][1] if found else data.START, max(0, cut - len(found)))
                assert found == whole
                assert ids_in(found[:per_pass], tokenizer, packing) == ids
