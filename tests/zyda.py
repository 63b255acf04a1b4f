"""A dataset repository shaped like Zyda-2, for hub_server.py: its configs, folders and columns, but made-up text."""

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

ZYDA = "Zyphra/Zyda-2"
COMPONENTS = ("dclm_crossdeduped", "dolma-cc_crossdeduped-filtered", "fwe3", "zyda_crossdeduped-filtered")
COMMON = ". , the of and to in a is that it was for on as with he be at by had not are but from or have an they which"
SCHEMA = pyarrow.schema([("nemo_id", pyarrow.string()), ("text", pyarrow.string())])


def zyda_documents(count: int, seed: int = 0) -> dict[str, list[str]]:
    """Return `count` different texts, spread over the components: made-up words, as frequent as Zipf's law has it."""
    rng = random.Random(seed)
    syllables = [a + b + c for a in "bcdfglmnprstvw" for b in "aeiou" for c in ("", "", "n", "r", "s", "ll", "nd")]
    words = COMMON.split() + ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(3000)]
    sizes = [int(min(400, max(3, rng.lognormvariate(3.5, 0.8)))) for _ in range(count)]  # words; the median is 33
    drawn = iter(rng.choices(words, [1 / (rank + 3) for rank in range(len(words))], k=sum(sizes)))
    texts = [f"Page {k}: {' '.join(itertools.islice(drawn, size))}." for k, size in enumerate(sizes)]
    texts = [text.replace(" .", ".").replace(" ,", ",") for text in texts]
    return {component: texts[k :: len(COMPONENTS)] for k, component in enumerate(COMPONENTS)}


def make_zyda(
    root: Path, documents: Mapping[str, Sequence[str]], files_per_component: int = 2, rows_per_group: int = 1000
) -> Path:
    """Return the repository's folder below `root`; its `sample-100BT` holds the documents, given by component.

    Their ids are <component>-<row>. The config of each component holds one tiny document, and `default` all of those.
    """
    repo = root / ZYDA
    configs = {"default": "data/*/*/*", "sample-100BT": "sample/100BT/*/*"}
    for component in COMPONENTS:
        configs[component] = f"data/{component}/*/*"
        _write(repo / f"data/{component}/global-shard_01_of_10/0.parquet", {f"data-{component}": "tiny"}, 1)
    for component, texts in documents.items():
        files = min(files_per_component, len(texts))  # `datasets` fails on a file without rows
        bounds = [k * len(texts) // max(1, files) for k in range(files + 1)]
        for k, (start, end) in enumerate(itertools.pairwise(bounds)):
            rows = {f"{component}-{row:07d}": texts[row] for row in range(start, end)}
            _write(repo / f"sample/100BT/{component}/part_{k:05d}.parquet", rows, rows_per_group)
    entry = "- config_name: {}\n  data_files:\n  - split: train\n    path: {}"
    configs_yaml = "\n".join(entry.format(name, path) for name, path in configs.items())
    (repo / "README.md").write_text(
        f"---\nlicense: odc-by\nconfigs:\n{configs_yaml}\n---\n# Zyda-2\n", encoding="utf-8"
    )
    return repo


def _write(path: Path, rows: Mapping[str, str], rows_per_group: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"nemo_id": list(rows), "text": list(rows.values())}, schema=SCHEMA)
    parquet.write_table(table, path, row_group_size=rows_per_group)
