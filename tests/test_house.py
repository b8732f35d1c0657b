"""The rooms of the package: imports go downward only, without circles, and files stay short.

The order of the rooms is the list in the docstring of `sao_utils`.
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "sao_utils"
LONGEST = 400  # lines of a file


def read_floors(package: Path) -> dict[str, int]:
    """The floor of each room, 0 for the ground, from the list in the package's docstring."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text("utf-8")))
    lines = re.findall(r"^    (\w+(?:, \w+)*) +\S", docstring, re.MULTILINE)
    return {room: floor for floor, line in enumerate(lines) for room in line.split(", ")}


def module_names(package: Path) -> dict[str, Path]:
    """The file of each module, by its name inside the package: "stages.pairs"; "" is the package."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts)
        .removesuffix("__init__")
        .rstrip("."): path
        for path in sorted(package.rglob("*.py"))
    }


def imports(package: Path) -> dict[str, set[str]]:
    """What each module imports from the package, also inside functions and for type checks only."""
    modules = module_names(package)
    found = {}
    for module, path in modules.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            for name in _imported(node, package.name):
                while name not in modules:  # a function or class: the module that holds it
                    name = name.rpartition(".")[0]
                found[module].add(name)
        found[module] -= {module, ""}
    return found


def _imported(node: ast.AST, package: str) -> list[str]:
    """The names inside the package that one statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, f"line {node.lineno}: a relative import"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    return [n.partition(".")[2] for n in names if n.partition(".")[0] == package]


def wrong_arrows(package: Path) -> list[str]:
    """Imports that go up, in words, and modules that are in no room."""
    floors, modules, wrong = read_floors(package), module_names(package), []
    for module, targets in imports(package).items():
        room = module.partition(".")[0]
        if room not in floors:
            if room not in ("", "__main__"):
                wrong.append(f"'{room}' is not a room of the list in sao_utils/__init__.py")
            continue
        for target in sorted(targets):
            other = target.partition(".")[0]
            if other != room and floors.get(other, -1) >= floors[room]:
                place = "below" if floors[other] > floors[room] else "beside"
                file = modules[module].relative_to(package)
                wrong.append(f"{file} imports {target}: {room} is {place} {other}")
    return list(dict.fromkeys(wrong))


def circle(package: Path) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; [] if none do."""
    try:
        TopologicalSorter(imports(package)).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def too_long(package: Path) -> list[str]:
    """The files with more lines than a reader wants to see at once."""
    sizes = {path: len(path.read_text("utf-8").splitlines()) for path in package.rglob("*.py")}
    return [
        f"{path.relative_to(package)} has {n} lines" for path, n in sizes.items() if n > LONGEST
    ]


def test_imports_go_downward_only():
    assert not wrong_arrows(PACKAGE), "\n" + "\n".join(wrong_arrows(PACKAGE))


def test_no_modules_import_each_other_in_a_circle():
    assert not circle(PACKAGE), " -> ".join(circle(PACKAGE))


def test_no_file_is_too_long():
    assert not too_long(PACKAGE), "\n" + "\n".join(too_long(PACKAGE))


def test_every_room_of_the_list_is_there():
    rooms = {module.partition(".")[0] for module in module_names(PACKAGE)}
    assert set(read_floors(PACKAGE)) <= rooms


# ---------------------------------------------------------------------- the checks themselves
