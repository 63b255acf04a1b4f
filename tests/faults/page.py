"""docs/what-happens-when.md, made of the names and docstrings of the tests in this folder: python -m tests.faults.page.

A test's name is the event, the first paragraph of its docstring what happens then. Nothing is imported, so that it
takes no time; tests/test_what_happens.py says when the page is no longer what the tests say.
"""

import ast
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
PAGE = ROOT / "docs" / "what-happens-when.md"
HEAD = """# What happens when

Made by `python -m tests.faults.page` from the tests in `tests/faults`: each of these is tried, small with every change
and at full figures for the scorecard (`docs/scorecard.md`). Exit codes: 75 run it again, 78 the files or settings
don't fit, 129, 130 and 143 interrupted and saved.
"""


class Event(NamedTuple):
    check: int
    name: str
    then: str
    file: str


def areas() -> dict[int, str]:
    """Return the area of each check, as tests/scorecard.py has them."""
    tree = ast.parse((FOLDER.parent / "scorecard.py").read_text(encoding="utf-8"))
    calls = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    found: dict[int, str] = {}
    for call in calls:
        values: list[Any] = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        if isinstance(call.func, ast.Name) and call.func.id == "check":
            found[values[0]] = values[1]
    return found


def check_of(function: ast.FunctionDef) -> int | None:
    for mark in function.decorator_list:
        if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Attribute) and mark.func.attr == "check":
            number: Any = ast.literal_eval(mark.args[0])
            return number
    return None


def events() -> list[Event]:
    """Return what is tried, check by check."""
    found = []
    for path in sorted(FOLDER.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (number := check_of(node)) is not None:
                then = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                name = node.name.removeprefix("test_").replace("_", " ").capitalize()
                found.append(Event(number, name, then, path.name))
    return sorted(found, key=lambda event: event.check)


def page() -> str:
    known, parts = areas(), [HEAD]
    tried = events()
    for area in dict.fromkeys(known.values()):
        parts.append(f"## {area.capitalize()}\n")
        parts += [
            f"- **{event.name}.** {event.then} (check {event.check}, `{event.file}`)"
            for event in tried
            if known.get(event.check) == area
        ]
        parts.append("")
    return "\n".join(parts).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(events())} events")
