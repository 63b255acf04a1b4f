"""The notebook runs from top to bottom, and again after a disconnect; and it is fit to be read."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "moelet.ipynb"
TINY = [
    "model.d_model=32", "model.n_heads=2", "model.n_layers=2", "model.d_ff=64", "model.n_experts=4",
    "model.max_length=64", "tokenizer.vocab_size=400", "tokenizer.sample_bytes=60000", "data.shuffle_window=64",
    "train.device=cpu", "train.eval_tokens=2000", "train.checkpoint_steps=5",
]  # fmt: skip


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def as_python(text: str) -> str:
    """Return a cell as Python, where `!command {value}` is for the shell and a command that fails ends it all."""

    def shell(match: re.Match[str]) -> str:
        return f"{match[1]}shell(f{match[2]!r})"

    return re.sub(r"^( *)!(.*)$", shell, text, flags=re.MULTILINE)


PRELUDE = """
import subprocess, sys, types

def shell(command):
    print("+", command, flush=True)
    subprocess.run(command, shell=True, check="--to gguf" not in command)  # which not every recipe has

_exit_code = 0  # as in IPython, of the last command
shown = []
module = types.ModuleType("IPython.display")  # what the cells show is collected
module.HTML = lambda data: ("HTML", data)
module.Image = lambda path, width: ("Image", open(path, "rb").read())
module.display = shown.append
sys.modules["IPython"], sys.modules["IPython.display"] = types.ModuleType("IPython"), module
"""
EPILOGUE = """
kinds = [kind for kind, data in shown]
assert kinds == ["Image", "HTML"] and shown[0][1].startswith(b"\\x89PNG") and "srcdoc" in shown[1][1], kinds
print("RAN TO ITS END", last["step"])
"""


def run_notebook(parameters: str) -> str:
    """Run all cells, with other parameters, in a process; return what they print."""
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    tags = [cell["metadata"].get("tags", []) for cell in code]
    parts = [parameters if "parameters" in tags[k] else as_python(source(cell)) for k, cell in enumerate(code)]
    script = "\n".join([PRELUDE, *parts, EPILOGUE])
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.nightly
def test_recipes_of_other_shapes_come_to_the_end_too(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    parameters = "\n".join(
        [f"TEXT = {str(corpus)!r}", "MINUTES = 0.3", f"NAME = {str(tmp_path / 'run')!r}",
         "RECIPE = 'recipes/cpu-tiny.json'", f"CHANGES = {TINY!r}", "PROMPT = 'def '", "REPOSITORY = ''"]
    )  # fmt: skip
    assert "RAN TO ITS END" in run_notebook(parameters) and (tmp_path / "run-hf" / "modeling_moelet.py").exists()


def run_cell(words: str, before: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the one cell that holds `words`, after other lines, in a process."""
    (found,) = [source(cell) for cell in cells() if cell["cell_type"] == "code" and words in source(cell)]
    script = f"{before}\n{as_python(found)}"
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)


STAND_IN = """
import sys, types

class Taken:
    @staticmethod
    def from_pretrained(folder, **options):
        sys.exit(f"asked with {options}")

stand_in = sys.modules["transformers"] = types.ModuleType("transformers")
stand_in.AutoTokenizer = stand_in.AutoModelForCausalLM = Taken
"""


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ({}, "asked with {'trust_remote_code': False}"),
        ({"modeling_moelet.py": "ours"}, "asked with {'trust_remote_code': True}"),
        ({"modeling_moelet.py": "x"}, "run-hf holds code that is not this copy's"),
        ({"another.py": "x"}, "FileNotFoundError"),
    ],
)
def test_an_exports_code_runs_only_where_it_is_ours(code: dict[str, str], told: str, tmp_path: Path) -> None:
    (tmp_path / "run-hf").mkdir()
    for name, text in code.items():
        data = (ROOT / "moelet" / "export" / name).read_bytes() if text == "ours" else text.encode()
        (tmp_path / "run-hf" / name).write_bytes(data)
    done = run_cell("AutoTokenizer", f"RUN = {str(tmp_path / 'run')!r}{STAND_IN}", ROOT)
    assert done.returncode == 1 and told in done.stderr


def test_a_repository_that_gives_nothing_is_told(tmp_path: Path) -> None:
    done = run_cell("git clone", "REPOSITORY = 'https://x/OWNER/moelet'\nshell = print", tmp_path)
    assert done.returncode == 1 and "GIT_TERMINAL_PROMPT=0 git clone" in done.stdout
    assert "REPOSITORY is 'https://x/OWNER/moelet', which gave no copy. Set it in part 1" in done.stderr


@pytest.mark.nightly
def test_it_runs_to_its_end_and_again(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    parameters = "\n".join(
        [f"TEXT = {str(corpus)!r}", "MINUTES = 0.5", f"NAME = {str(tmp_path / 'run')!r}",
         "RECIPE = 'recipes/modern-cpu.json'", f"CHANGES = {TINY!r}", "PROMPT = 'def '", "REPOSITORY = ''"]
    )  # fmt: skip
    first = run_notebook(parameters)
    assert "RAN TO ITS END" in first and "bits per byte" in first and "ollama create" in first
    assert (tmp_path / "run-hf" / "model.safetensors").exists() and (tmp_path / "run.gguf").exists()
    steps = re.search(r"RAN TO ITS END (\d+)", first)
    again = run_notebook(parameters)  # as after a disconnect: nothing is done twice
    assert "this run is finished" in again and steps is not None and steps[0] in again
    assert "ollama create" not in again


def test_the_parameters_are_those_that_the_other_cells_use() -> None:
    tagged = [cell for cell in cells() if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names = re.findall(r"^([A-Z]+) = ", source(tagged[0]), re.MULTILINE)
    others = "\n".join(source(cell) for cell in cells() if cell["cell_type"] == "code" and cell not in tagged)
    assert len(names) == 7 and all(re.search(rf"\b{name}\b", others) for name in names)


def test_it_is_small_and_holds_no_outputs() -> None:
    assert NOTEBOOK.stat().st_size < 16_000
    for cell in cells():
        assert not cell.get("outputs") and cell.get("execution_count") is None
        if cell["cell_type"] == "code":
            assert len(cell["source"]) <= 20
            ast.parse(as_python(source(cell)))


def test_it_can_be_read_by_jupyter() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    needed = {"code": {"cell_type", "execution_count", "id", "metadata", "outputs", "source"}}
    for cell in notebook["cells"]:
        assert set(cell) == needed.get(cell["cell_type"], {"cell_type", "id", "metadata", "source"})
