"""The house rules that a machine can read: floors, sizes, and nothing that executes what strangers wrote."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moelet"
# a module imports from strictly lower floors only; a new module gets its floor in ARCHITECTURE.md's table
PLAN = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| (`.+?`) \|", PLAN, re.MULTILINE)
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {name.replace("/", "."): int(floor) for floor, names in ROWS for name in re.findall(r"`([\w/]+)\.py`", names)}
NAMES = {name.replace(".", "/") for name in FLOORS}
FLOORS |= {"__init__": -1} | {f"{path.parent.name}.__init__": 0 for path in FILES if path.parent.parent == PACKAGE}
LAZY = {"cli", "__init__"}  # their functions may import any module, so that --help is quick
MAX_FILE, MAX_FUNCTION = 400, 60  # lines
DOCUMENTS = {"README.md": 200, "ARCHITECTURE.md": 150, "CONTRIBUTING.md": 120}  # lines
VAGUE = {"utils", "util", "common", "helpers", "helper", "manager", "managers"}
CODE_FROM_DATA = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen"),
    *(
        "torch.load",
        "torch.jit.load",
        "torch.package.PackageImporter",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    ),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle", "runpy.run_path"),
}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
UNSAFE_KEYWORDS = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True}  # but so
# where else it is needed, and why: (file, what) -> reason
ALLOWED = {
    ("notebooks/moelet.ipynb", "trust_remote_code"): "loads an export whose code is, byte for byte, that of the copy",
    ("moelet/export/stranger.py", "trust_remote_code"): "loads our own export, with code that we just wrote there",
    ("tests/faults/code_in_files.py", "trust_remote_code"): "stands in a file that asks for it and must not get it",
    ("tests/hub_client.py", "runpy.run_path"): "reads the installed hub client's constants anew, for the test",
    ("tests/outsider.py", "trust_remote_code"): "the parity test of exports: as anybody would load what we exported",
    ("tests/test_prepare.py", "allow_pickle"): "makes the array of objects that must be refused",
}  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def parse(path: Path) -> ast.Module:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        code = ("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        text = re.sub(r"^( *)!.*$", r"\1pass", "\n".join(code), flags=re.MULTILINE)  # lines for a shell
    return ast.parse(text, str(path))


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
                target = source.removeprefix("moelet.")
                package = (PACKAGE / target.replace(".", "/")).is_dir()
                targets = [f"{target}.{alias.name}" for alias in node.names] if package else [target]
                yield from ((name, id(node) in inside, node.lineno) for name in targets)
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
    """Return what could run a stranger's code: each with its line, a colon and what it is."""
    faults, names = [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            faults.append(f"line {node.lineno}: bare except")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            bad = [name for name in modules if name.partition(".")[0] in UNSAFE_MODULES]
            faults += [f"line {node.lineno}: {name}" for name in bad]
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            first, dot, rest = dotted(node).partition(".")
            name = f"{names.get(first, first)}{dot}{rest}"
            faults += [f"line {node.lineno}: {name}"] if name in CODE_FROM_DATA else []
        elif isinstance(node, ast.Call):
            faults += [f"line {node.lineno}: {word}" for word, value in keywords_of(node) if is_unsafe(word, value)]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            words = [(key.value, value) for key, value in pairs if isinstance(key, ast.Constant)]
            faults += [f"line {node.lineno}: {word}" for word, value in words if is_unsafe(word, value)]
    return faults


def keywords_of(call: ast.Call) -> list[tuple[str, ast.expr]]:
    return [(keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg]


def is_unsafe(word: object, value: ast.expr) -> bool:
    """Return whether a keyword, or a key of a dict, is given anything but the constant that is safe."""
    safe = isinstance(value, ast.Constant) and value.value is UNSAFE_KEYWORDS.get(str(word))
    return word in UNSAFE_KEYWORDS and not safe


def project_files() -> list[Path]:
    """Return all Python of the project: the package, tests, benchmarks, the checks of submissions, the quick start,
    the notebook."""
    folders = ("moelet", "tests", "bench", ".ci")
    single = [ROOT / "train.py", *(ROOT / "notebooks").glob("*.ipynb")]
    return sorted([*single, *(path for name in folders for path in (ROOT / name).rglob("*.py"))])


def long_functions(tree: ast.Module) -> list[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{node.name} (line {node.lineno})": (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > MAX_FUNCTION]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    assert floor_faults(module_name(path), parse(path)) == []


def test_the_core_never_imports_the_rim() -> None:
    core, rim = (set(re.findall(r"`([\w/]+)\.py`", half)) & NAMES for half in PLAN.split("\nThe rim:"))
    for name in core:
        imported = {target for target, _, _ in house_imports(parse(PACKAGE / f"{name}.py"))}
        assert not {target.replace(".", "/") for target in imported} & (rim - core), name


def test_every_floor_has_its_module() -> None:
    assert set(FLOORS) == set(map(module_name, FILES))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    assert long_functions(ast.parse(text)) == []


def test_no_code_from_data() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), fault.partition(": ")[2]): fault
        for path in project_files()
        for fault in safety_faults(parse(path))
    }
    assert {place: fault for place, fault in found.items() if place not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found), "what nobody needs any more isn't allowed any more"
    assert {file for file, _ in ALLOWED if file.startswith("moelet/")} == {"moelet/export/stranger.py"}


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
        ("study.verdict", "from moelet.study import prove"),
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
        "from torch import load\nload(x)",
        "subprocess.run(x, shell=True)",
        "load_dataset(x, trust_remote_code=True)",
        "np.load(x, allow_pickle=True)",
        "yaml.load(x)",
        "import torch as t\nt.load(x)",
        "from yaml import load as read\nread(x)",
        "f = eval",
        "os.popen(x)",
        "load(x, trust_remote_code=flag)",
        "load(x, **{'trust_remote_code': flag})",
        "torch.load",
    ],
)
def test_code_from_data_is_seen(source: str) -> None:
    assert len(safety_faults(ast.parse(source))) == 1


INNOCENT = """
model.eval(), yaml.safe_load(x), re.compile(x), run(x, shell=False), json.load(x), safetensors.torch.load(x)
options = {"trust_remote_code": False, "weights_only": True}
"""


def test_innocent_names_are_not() -> None:
    assert safety_faults(ast.parse(INNOCENT)) == []


def test_a_long_function_is_seen() -> None:
    body = "\n    x = 1"
    assert long_functions(ast.parse("def f():" + body * MAX_FUNCTION)) != []
    assert long_functions(ast.parse("def f():" + body * (MAX_FUNCTION - 1))) == []
