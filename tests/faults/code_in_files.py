"""Files that run code where they are loaded as others load them, and the commands that are given each.

Each leaves a file behind, the canary, if its code runs. What it takes to run it is in CONTROLS, so that the corpus is
known to bite.
"""

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Make = Callable[[Path, str], bytes]  # of a canary's path, and a line of Python that makes it


def python_line(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def pickled(canary: Path, line: str) -> bytes:
    """A pickle that calls exec, in the oldest protocol."""
    return b"cbuiltins\nexec\n(V" + line.encode() + b"\ntR."


def torch_zip(canary: Path, line: str) -> bytes:
    """What torch.save writes, its pickle another."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in (("data.pkl", pickled(canary, line)), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", data)
    return out.getvalue()


def torch_old(canary: Path, line: str) -> bytes:
    """What torch.save wrote before it used zip: a row of pickles."""
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    return magic + b"\x80\x02M\xe9\x03." + b"\x80\x02}q\x00." + pickled(canary, line)


def objects(canary: Path, line: str) -> bytes:
    """A .npy of objects."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickled(canary, line)


def objects_zip(canary: Path, line: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("arr_0.npy", objects(canary, line))
    return out.getvalue()


def yaml_tag(canary: Path, line: str) -> bytes:
    return f"!!python/object/apply:builtins.exec\n- {json.dumps(line)}\n".encode()


def template(canary: Path, line: str) -> bytes:
    """A chat template that leaves its sandbox where there is none."""
    return ("{{ cycler.__init__.__globals__.__builtins__.exec(" + json.dumps(line) + ") }}").encode()


def source(canary: Path, line: str) -> bytes:
    return f"{line}\n".encode()


def object_json(canary: Path, line: str) -> bytes:
    """JSON by which other libraries name what they call."""
    call = {"py/reduce": [{"py/function": "builtins.exec"}, {"py/tuple": [line]}], "_target_": "builtins.exec"}
    return json.dumps({**call, "_args_": [line], "__reduce__": line, "class": "builtins.exec", "eval": line}).encode()


# how others load them; each is given the file and must leave the canary
CONTROLS: dict[Make, str] = {
    pickled: "import pickle; pickle.load(open(path, 'rb'))",
    torch_zip: "import torch; torch.load(path, weights_only=False)",
    torch_old: "import torch; torch.load(path, weights_only=False)",
    objects: "import numpy; numpy.load(path, allow_pickle=True)",
    objects_zip: "import numpy; numpy.load(path, allow_pickle=True)['arr_0']",
    yaml_tag: "import yaml; yaml.unsafe_load(open(path))",
    template: "import jinja2; jinja2.Template(open(path).read()).render()",
    source: "import runpy; runpy.run_path(path)",
}
MAKES = (pickled, torch_zip, torch_old, objects, objects_zip, yaml_tag, template, source, object_json)


class Trap(NamedTuple):
    """A file of a stranger's in its place, and the commands that people would give it to."""

    name: str
    set: Callable[[Path, Path], None]  # in a folder with one of everything, for a canary
    commands: list[list[str]]  # `moelet ...`, from within that folder


STEP = "run/checkpoints/step-00000002"
USES = [
    ["generate", "run", "--prompt", "a", "--tokens", "2"],
    ["evaluate", "run", "--tokens", "100"],
    ["inspect", "run", "--tokens", "100", "--ablation-tokens", "0"],
    ["train", "--resume", "run", "--set", "train.train_steps=3", "--accept-changes"],
    ["export", "run", "--to", "hf", "--out", "out"],
    ["upcycle", "run", "--run", "new"],
]
BROKEN = [*USES[:4], ["export", "run", "--to", "gguf", "--out", "out.gguf"], USES[5]]
WITH_TEXT = [
    ["train", "tiny.json", "--run", "new", "--set", "data.files={}"],
    ["prepare", "tiny.json", "--out", "made", "--tokens", "500", "--set", "data.files={}"],
    ["tokenizer", "train", "{}", "--out", "t.model", "--vocab-size", "300"],
    ["evaluate", "run", "--data", "{}", "--tokens", "100"],
]
IMPORT = [["import", "stock", "tiny.json", "--run", "new"]]
PREPARED = [["train", "prepared/hparams.json", "--run", "new"], ["prepare", "tiny.json", "--out", "prepared"]]


def written(name: str, make: Make) -> Callable[[Path, Path], None]:
    """Return what puts a file in its place."""

    def put(folder: Path, canary: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make(canary, python_line(canary)))

    return put


def with_settings(name: str, **more: object) -> Callable[[Path, Path], None]:
    """Return what adds keys to a JSON file; LINE in a value stands for the code."""

    def put(folder: Path, canary: Path) -> None:
        values = json.loads(json.dumps(more).replace("LINE", json.dumps(python_line(canary))[1:-1]))
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | values))
        for module in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
            (folder / name).with_name(module).write_bytes(source(canary, python_line(canary)))

    return put


def dataset_script(folder: Path, canary: Path) -> None:
    for name in ("dataset/dataset.py", "dataset/__init__.py", "dataset/metric.py"):
        written(name, source)(folder, canary)
    written("dataset/data/train.pkl", pickled)(folder, canary)


def in_metadata(folder: Path, canary: Path) -> None:
    """A safetensors file is as it should be, and has code where others put what they load."""
    path = folder / "stock" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"__metadata__": {"format": "pt", "pickle": python_line(canary)}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def cached_kernels(folder: Path, canary: Path) -> None:
    """Modules under the names of what moelet imports, in the folder that it is started in."""
    for name in ("torch", "yaml", "gguf", "lm_eval", "sitecustomize", "conftest", "moelet", "datasets"):
        (folder / f"{name}.py").write_bytes(source(canary, python_line(canary)))
        shutil.copy(folder / f"{name}.py", folder / "run" / f"{name}.py")


AUTO_MAP = {
    "auto_map": {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
    "trust_remote_code": True,
    "custom_pipelines": {"x": {"impl": "modeling_evil.P"}},
}
TRAPS = [
    *(Trap(f"weights: {m.__name__}", written(f"{STEP}/model.safetensors", m), BROKEN) for m in MAKES),
    *(Trap(f"optimizer: {m.__name__}", written(f"{STEP}/optimizer.safetensors", m), BROKEN[3:4]) for m in MAKES),
    *(Trap(f"tokenizer: {m.__name__}", written("run/tokenizer.model", m), BROKEN[:4]) for m in MAKES),
    Trap("state: objects in JSON", written(f"{STEP}/state.json", object_json), BROKEN[3:4]),
    Trap("manifest: objects in JSON", written(f"{STEP}/manifest.json", object_json), BROKEN[:4]),
    Trap("manifest: a pickle", written(f"{STEP}/manifest.json", pickled), BROKEN[:1]),
    Trap("measurements: a pickle", written("run/metrics.jsonl", pickled), USES[2:4]),
    Trap("measurements: objects in JSON", written("run/metrics.jsonl", object_json), USES[2:4]),
    *(
        Trap(f"beside the checkpoint: {name}", written(f"{STEP}/{name}", make), USES[:4])
        for name, make in (
            ("pytorch_model.bin", torch_zip), ("optimizer.pt", torch_old), ("rng_state.pth", torch_zip),
            (".metadata", pickled), ("training_args.bin", torch_zip), ("__0_0.distcp", torch_zip),
        )
    ),
    Trap("modules of known names", cached_kernels, USES[:5]),
    Trap("settings with code", with_settings("run/hparams.json", _target_="LINE", **AUTO_MAP), BROKEN[:4]),
    Trap("settings: a pickle", written("run/hparams.json", pickled), BROKEN[:4]),
    Trap("settings to train by: code", with_settings("tiny.json", hook="LINE"), [["train", "tiny.json", "--run", "new"],
                                                                              ["plan", "tiny.json"]]),
    Trap("settings to train by: yaml", written("tiny.yaml", yaml_tag), [["train", "tiny.yaml", "--run", "new"]]),
    Trap("export: auto_map", with_settings("stock/config.json", **AUTO_MAP), IMPORT),
    Trap("export: quantised by code", with_settings("stock/config.json", quantization_config={"x": "LINE"}), IMPORT),
    Trap("export: weights with metadata", in_metadata, IMPORT),
    *(Trap(f"export: weights: {m.__name__}", written("stock/model.safetensors", m), IMPORT) for m in MAKES),
    *(
        Trap(f"export: {name}", written(f"stock/{name}", make), IMPORT)
        for name, make in (
            ("pytorch_model.bin", torch_zip), ("chat_template.jinja", template), ("tokenizer.json", object_json),
            ("tokenizer_config.json", object_json), ("generation_config.json", object_json), ("config.json", yaml_tag),
            ("modeling_moelet.py", source), ("tokenization_moelet.py", source), ("custom_generate/generate.py", source),
            ("added_tokens.json", pickled), ("model.safetensors.index.json", pickled), ("tokenizer.model", torch_old),
        )
    ),
    *(
        Trap(f"text: {name}", written(f"text/{name}", make),
             [[word.replace("{}", f"text/{name}") for word in command] for command in WITH_TEXT])
        for name, make in (
            ("a.txt", source), ("a.jsonl", object_json), ("a.parquet", pickled), ("a.txt.gz", pickled),
            ("a.pkl", pickled), ("a.jsonl.zst", torch_zip), ("a.npy", objects),
        )
    ),
    *(
        Trap(f"prepared: {name}", written(f"prepared/{name}", make), PREPARED)
        for name, make in (
            ("shard-00000/ids.npy", objects), ("shard-00000/item_kinds.npy", objects), ("shard-00000/ids.npy", pickled),
            ("shard-00000/digests.npy", objects_zip), ("manifest.json", pickled), ("tokenizer.model", pickled),
            ("made_from.json", object_json),
        )
    ),
    *(
        Trap(f"a tokenizer of its own: {m.__name__}", written("t.model", m),
             [["tokenizer", "encode", "t.model", "a"], ["tokenizer", "decode", "t.model", "5"],
              ["train", "tiny.json", "--run", "new", "--set", "tokenizer.file=t.model"]])
        for m in (pickled, torch_zip, source)
    ),
    *(
        Trap(f"tasks: {name}", written(name, make), [["evaluate", "run", "--tokens", "100", "--tasks", name]])
        for name, make in (("t.jsonl", object_json), ("t.jsonl", pickled), ("t.yaml", yaml_tag), ("t.py", source))
    ),
    Trap("a dataset with a script", dataset_script,
         [["train", "tiny.json", "--run", "new", "--set", "data.source=hub", "--set", "data.dataset=./dataset"]]),
]  # fmt: skip


def every_command() -> list[tuple[Trap, list[str]]]:
    return [(trap, command) for trap in TRAPS for command in trap.commands]
