"""The floors: imports go down only, rooms of one floor do not know each other, files do not go in circles.

| floor   | rooms                                                              |
|---------|--------------------------------------------------------------------|
| cli     | cli                                                                |
| flows   | flows                                                              |
| compose | train verify evaluate                                              |
| rooms   | model parallel data corpus tasks checkpoint planner report launcher |
| ground  | errors log files processes units layout tokenizer config native mcore        |

A room of the ground may use those left of it. Within a room, a sub-folder counts as one: sub-folders and the files
beside them do not import each other in circles.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = "meditron_train"
ROOT = Path(__file__).parents[1] / PACKAGE

GROUND = ("errors", "log", "files", "processes", "units", "layout", "tokenizer", "config", "native", "mcore")
FLOORS = (
    GROUND,
    ("model", "parallel", "data", "corpus", "tasks", "checkpoint", "planner", "report", "launcher"),
    ("train", "verify", "evaluate"),
    ("flows",),
    ("cli",),
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}

# What only one room may import, and the calls that only one room may make.
OWNED_PACKAGES = {"megatron": "mcore", "safetensors": "checkpoint"}
GROUP_MAKERS = {
    "init_process_group",
    "new_group",
    "new_subgroups",
    "new_subgroups_by_enumeration",
    "init_device_mesh",
    "initialize_model_parallel",
}
# What runs the program in a pickle, and the one file that may use it (None: no file).
_READING = "mcore.reading"
LOADERS: dict[tuple[str, str], str | None] = {
    ("dist_checkpointing", "load"): _READING,
    **{("dist_checkpointing", f"load_{what}"): None for what in ("common_state_dict", "content_metadata")},
    **{("dist_checkpointing", f"load_{what}"): None for what in ("plain_tensors", "tensors_metadata")},
    **{("pickle", reader): None for reader in ("load", "loads", "Unpickler", "_Unpickler")},
    **{("torch", reader): None for reader in ("load", "package", "jit", "hub")},
    **{(module, "load"): None for module in ("np", "numpy")},
}
LOADER_PACKAGES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@dataclass(frozen=True)
class Import:
    """`file` (a dotted module) imports `module` at `line`."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file} (line {self.line}) imports {self.module}"


def modules_in(root: Path) -> dict[str, Path]:
    """Dotted name of every Python file below the package."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All nodes of a file, parsed once for all that look through them."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))))


@pytest.fixture(scope="module", autouse=True)
def forget() -> Iterator[None]:
    yield
    nodes_of.cache_clear()


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """All imports of a file, also those inside functions; `from package import module` names the module."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(name, node.lineno, full if full in modules else base)


def room_of(module: str) -> str | None:
    """The room of one of our modules; None for the package itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def all_imports(root: Path) -> list[Import]:
    modules = modules_in(root)
    return [found for name, path in modules.items() for found in imports_of(name, path, modules)]


def unknown_rooms(root: Path) -> list[str]:
    rooms = {room_of(name) for name in modules_in(root)} - {None, "__main__"}
    return sorted(f"{PACKAGE}.{room} is on no floor" for room in rooms if room not in FLOOR_OF)


def floor_problems(root: Path) -> list[str]:
    """Imports that go up, or to a neighbor."""
    problems = []
    for found in all_imports(root):
        here, there = room_of(found.file), room_of(found.module)
        if there is None or here == there or here not in FLOOR_OF:
            continue
        if there not in FLOOR_OF:
            problems.append(f"{found}, which is on no floor")
        elif FLOOR_OF[there] > FLOOR_OF[here]:
            problems.append(f"{found}, which is on a higher floor")
        elif FLOOR_OF[there] == FLOOR_OF[here]:
            left = here in GROUND and GROUND.index(there) < GROUND.index(here)
            if not left:
                problems.append(f"{found}: rooms of one floor do not know each other")
    return problems


def owner_problems(root: Path) -> list[str]:
    """Packages and process groups outside the one room that owns them."""
    problems = []
    for found in all_imports(root):
        owner = OWNED_PACKAGES.get(found.module.split(".")[0])
        if owner is not None and room_of(found.file) != owner:
            problems.append(f"{found}: only {PACKAGE}.{owner} may")
    for name, path in modules_in(root).items():
        if room_of(name) == "parallel":
            continue
        for node in nodes_of(path):
            called = node.func if isinstance(node, ast.Call) else None
            maker = getattr(called, "attr", None) or getattr(called, "id", None)
            if maker in GROUP_MAKERS:
                problems.append(
                    f"{name} (line {node.lineno}) calls {maker}: only {PACKAGE}.parallel makes process groups"
                )
    return problems


def loader_problems(root: Path) -> list[str]:
    """Calls that run what a file says, outside of the one place that hands megatron-core a reader of ours."""
    problems = []
    for name, path in modules_in(root).items():
        for node in nodes_of(path):
            found = None
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found = (node.value.id, node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = next(
                    ((node.module, a.name) for a in node.names if (node.module, a.name) in LOADERS), None
                )
            elif isinstance(node, ast.Import | ast.ImportFrom):
                continue
            if found in LOADERS and LOADERS[found] != name.removeprefix(PACKAGE + "."):
                problems.append(
                    f"{name} (line {node.lineno}) uses {'.'.join(found)}, which runs what a file says: "
                    "read it by checkpoint.files.pickled"
                )
    problems += [
        f"{found}, which runs what a file says"
        for found in all_imports(root)
        if found.module.split(".")[0] in LOADER_PACKAGES
    ]
    return problems


def circles(root: Path) -> list[str]:
    """Files of one room that import each other in a circle, the shortest way to say it."""
    modules = modules_in(root)
    graph: dict[str, list[str]] = {name: [] for name in modules}
    for found in all_imports(root):
        if found.module in modules and room_of(found.file) == room_of(found.module):
            graph[found.file].append(found.module)
    return circles_of(graph)


def parts_below(file: str, module: str) -> tuple[str, str] | None:
    """The two neighbors that an import connects, at the folder where file and module part: `room.a.x` that imports
    `room.b.y` connects `room.a` and `room.b`. None when it stays within one file or leaves the room."""
    here, there = file.split("."), module.split(".")
    depth = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), None)
    if depth is None or depth < 2:
        return None
    return ".".join(here[: depth + 1]), ".".join(there[: depth + 1])


def folder_circles(root: Path) -> list[str]:
    """Sub-folders (and files beside them) of a room that import each other in a circle, with the imports that do."""
    modules = modules_in(root)
    graph: dict[str, list[str]] = {}
    imports: dict[tuple[str, str], Import] = {}
    for found in all_imports(root):
        if found.module in modules and (parts := parts_below(found.file, found.module)):
            here, there = parts
            graph.setdefault(here, []).append(there)
            graph.setdefault(there, [])
            imports.setdefault(parts, found)
    return [
        f"{circle}: "
        + "; ".join(str(imports[pair]) for pair in pairwise(circle.split(" -> ")) if pair in imports)
        for circle in circles_of(graph)
    ]


def circles_of(graph: dict[str, list[str]]) -> list[str]:
    problems, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            problems.append(" -> ".join([*path[path.index(name) :], name]))
            return
        if name in done:
            return
        for neighbor in graph[name]:
            visit(neighbor, [*path, name])
        done.add(name)

    for name in graph:
        visit(name, [])
    return problems


@pytest.mark.parametrize(
    "check", [unknown_rooms, floor_problems, owner_problems, loader_problems, circles, folder_circles]
)
def test_the_package(check):
    problems = check(ROOT)
    assert not problems, "\n" + "\n".join(problems)


PLANTED = [
    (unknown_rooms, {"attic/box.py": ""}, "meditron_train.attic is on no floor"),
    (floor_problems, {"data/a.py": "import meditron_train.train.loop"}, "higher floor"),
    (
        floor_problems,
        {"data/a.py": "def f():\n    from meditron_train.checkpoint import x"},
        "do not know each",
    ),
    (
        floor_problems,
        {"train/a.py": "from meditron_train import verify", "verify/__init__.py": ""},
        "do not know",
    ),
    (
        floor_problems,
        {"data/a.py": "from ..model import llama", "model/llama.py": ""},
        "do not know each other",
    ),
    (floor_problems, {"config/a.py": "from meditron_train.mcore import x"}, "do not know each other"),
    (floor_problems, {"errors.py": "import meditron_train.log"}, "do not know each other"),
    (
        owner_problems,
        {"model/a.py": "import torch\nfrom megatron.core import x"},
        "a (line 2) imports megatron.core: only",
    ),
    (owner_problems, {"verify/a.py": "import safetensors.torch"}, "only meditron_train.checkpoint may"),
    (owner_problems, {"train/a.py": "import torch\ntorch.distributed.new_group([0])"}, "calls new_group"),
    (owner_problems, {"train/a.py": "init_process_group('gloo')"}, "calls init_process_group"),
    (loader_problems, {"train/a.py": "import torch\ntorch.load('x')"}, "a (line 2) uses torch.load"),
    (loader_problems, {"train/a.py": "from pickle import loads"}, "uses pickle.loads"),
    (loader_problems, {"train/a.py": "def f():\n    import dill"}, "imports dill"),
    (
        loader_problems,
        {"checkpoint/a.py": "from x import dist_checkpointing as d\ndist_checkpointing.load({}, 'x')"},
        "uses dist_checkpointing.load",
    ),
    (circles, {"data/a.py": "from . import b", "data/b.py": "from meditron_train.data.a import x"}, "a -> "),
    (
        folder_circles,
        {
            "train/guard/a.py": "from meditron_train.train.life import b",
            "train/life/b.py": "",
            "train/life/c.py": "import meditron_train.train.guard.d",
            "train/guard/d.py": "",
        },
        "train.life.c (line 1) imports meditron_train.train.guard.d",
    ),
    (
        folder_circles,
        {
            "train/a.py": "from meditron_train.train.life import b",
            "train/life/b.py": "import meditron_train.train.a",
        },
        "train.life.b (line 1) imports meditron_train.train.a",
    ),
    (
        circles,
        {
            "data/__init__.py": "from meditron_train.data.a import x",
            "data/a.py": "import meditron_train.data",
        },
        " -> ",
    ),
]


@pytest.mark.parametrize(("check", "files", "said"), PLANTED)
def test_planted_mistakes_are_found(tmp_path, check, files, said):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    problems = check(tmp_path)
    assert len(problems) == 1
    assert said in problems[0]


def test_what_is_allowed_passes(tmp_path):
    files = {
        "errors.py": "",
        "config/load.py": "from meditron_train.errors import x\nfrom meditron_train import __version__",
        "data/a.py": "from meditron_train.config import load\nfrom meditron_train.data.b import x",
        "data/b.py": "import torch",
        "data/packing/c.py": "from meditron_train.data import b",
        "data/d.py": "from meditron_train.data.packing import c",
        "parallel/mesh.py": "torch.distributed.new_group([0])",
        "mcore/__init__.py": "import megatron.core",
        "train/loop.py": "from meditron_train.data import a\nfrom meditron_train.parallel import mesh",
        "cli/main.py": "import meditron_train.train.loop",
        "__main__.py": "from meditron_train.cli.main import main",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for check in (unknown_rooms, floor_problems, owner_problems, circles, folder_circles):
        assert check(tmp_path) == []


MAX_FUNCTION_LINES = 80


def long_functions(package: Path) -> list[str]:
    """Functions that are too long to be read at once; the docstring does not count."""
    problems = []
    for path in sorted(package.rglob("*.py")):
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    docstring = node.body[0]
                    num_lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    problems.append(f"{path.relative_to(package)}: {node.name} has {num_lines} lines")
    return problems


def test_functions_can_be_read_at_once(tmp_path):
    assert long_functions(ROOT) == []
    (tmp_path / "a.py").write_text('def f():\n    """One\n    two."""\n' + "    pass\n" * 80)
    assert long_functions(tmp_path) == ["a.py: f has 81 lines"]
