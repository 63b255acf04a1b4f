"""The house rules that a machine can read: floors, sizes, and nothing that executes what strangers wrote."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moelet"
# a module imports from strictly lower floors only; a new module gets its floor in ARCHITECTURE.md's table
FLOORS = {"__init__": -1} | {
    name.replace("/", "."): int(floor)
    for floor, name in re.findall(
        r"^\| (\d+) \| `([\w/]+)\.py` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE
    )
}
LAZY = {"cli", "__init__"}  # their functions may import any module, so that --help is quick
MAX_FILE, MAX_FUNCTION = 400, 60  # lines
DOCUMENTS = {"README.md": 200, "ARCHITECTURE.md": 150, "CONTRIBUTING.md": 120}  # lines
VAGUE = {"utils", "util", "common", "helpers", "helper", "manager", "managers"}
CODE_FROM_DATA = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system"}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_KEYWORDS = {("shell", True), ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False)}

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def house_imports(tree: ast.Module) -> Iterator[tuple[str, bool, int]]:
    """Yield (module, whether inside a function, line) for everything a file imports from the package."""
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            if source == "moelet":
                yield from ((alias.name, id(node) in inside, node.lineno) for alias in node.names)
            elif source.startswith("moelet."):
                yield source.removeprefix("moelet."), id(node) in inside, node.lineno
            elif node.level:
                yield f"relative import {source}", id(node) in inside, node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "moelet":
                    yield f"import {alias.name}", id(node) in inside, node.lineno


def floor_faults(name: str, tree: ast.Module) -> list[str]:
    if name not in FLOORS:
        return [f"{name} has no floor: give it one in ARCHITECTURE.md"]
    faults = []
    for target, lazily, line in house_imports(tree):
        if target not in FLOORS:
            faults.append(f"{name}:{line} imports {target}, which is no module with a floor (from moelet.x import y)")
        elif not (lazily and name in LAZY) and FLOORS[target] >= FLOORS[name]:
            faults.append(f"{name}:{line} (floor {FLOORS[name]}) imports {target} (floor {FLOORS[target]})")
    return faults


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def safety_faults(tree: ast.Module) -> list[str]:
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            faults.append(f"line {node.lineno}: bare except")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            bad = [name for name in names if name.partition(".")[0] in UNSAFE_MODULES]
            faults += [f"line {node.lineno}: imports {name}" for name in bad]
            if isinstance(node, ast.ImportFrom):
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                faults += [f"line {node.lineno}: imports {name}" for name in full if name in CODE_FROM_DATA]
        elif isinstance(node, ast.Call):
            if dotted(node.func) in CODE_FROM_DATA:
                faults.append(f"line {node.lineno}: calls {dotted(node.func)}")
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if isinstance(value, bool) and (keyword.arg, value) in UNSAFE_KEYWORDS:
                    faults.append(f"line {node.lineno}: {keyword.arg}={value}")
    return faults


def long_functions(tree: ast.Module) -> list[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{node.name} (line {node.lineno})": (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > MAX_FUNCTION]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    assert floor_faults(module_name(path), parse(path)) == []


def test_every_floor_has_its_module() -> None:
    assert set(FLOORS) == set(map(module_name, FILES))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    assert long_functions(ast.parse(text)) == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_code_from_data(path: Path) -> None:
    assert safety_faults(parse(path)) == []


def test_names_say_something() -> None:
    assert not {part for path in FILES for part in module_name(path).split(".")} & VAGUE


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_short(name: str) -> None:
    path = ROOT / name
    assert path.is_file(), f"{name} is missing"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= DOCUMENTS[name]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("experts", "from moelet.moe import Router"),  # upwards
        ("experts", "from moelet.optim import Plan"),  # sideways
        ("experts", "def f():\n    from moelet.train import train"),  # lazily
        ("experts", "from moelet import train as training"),
        ("experts", "import moelet.errors"),
        ("experts", "from .errors import pick"),
        ("cli", "from moelet.__main__ import main"),
        ("__init__", "from moelet.errors import UserError"),
        ("novelty", ""),
    ],
)
def test_a_wrong_import_is_seen(name: str, source: str) -> None:
    assert len(floor_faults(name, ast.parse(source))) == 1


def test_a_right_import_is_not() -> None:
    assert floor_faults("experts", ast.parse("import torch\nfrom moelet.errors import pick")) == []
    assert floor_faults("cli", ast.parse("def f():\n    from moelet.__main__ import main")) == []


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept:\n    pass",
        "eval(x)",
        "exec(x)",
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "subprocess.run(x, shell=True)",
        "load_dataset(x, trust_remote_code=True)",
        "np.load(x, allow_pickle=True)",
        "yaml.load(x)",
    ],
)
def test_code_from_data_is_seen(source: str) -> None:
    assert len(safety_faults(ast.parse(source))) == 1


def test_innocent_names_are_not() -> None:
    assert safety_faults(ast.parse("model.eval()\nyaml.safe_load(x)\nre.compile(x)\nrun(x, shell=False)")) == []


def test_a_long_function_is_seen() -> None:
    body = "\n    x = 1"
    assert long_functions(ast.parse("def f():" + body * MAX_FUNCTION)) != []
    assert long_functions(ast.parse("def f():" + body * (MAX_FUNCTION - 1))) == []
