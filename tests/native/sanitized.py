"""C++ programs of tests/native/cpp, compiled with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
COMPILE_WITH = re.compile(r"^// compile with: (.*)$", re.MULTILINE)


def run(program: str, sources: list[Path], folder: Path, *arguments: str) -> str:
    """Compile tests/native/cpp/PROGRAM.cpp with `sources`, run it, and return what it printed.

    Files that name flags for themselves get them, but for the optimisation: the sanitizers want -O1.
    """
    objects = []
    for source in [ROOT / "tests/native/cpp" / f"{program}.cpp", *sources]:
        own = COMPILE_WITH.search(source.read_text())
        flags = [flag for flag in own[1].split() if not flag.startswith("-O")] if own else []
        objects.append(folder / f"{source.stem}.o")
        command = [
            "g++",
            *FLAGS,
            *WARNINGS,
            *flags,
            "-I",
            str(ROOT / "csrc"),
            "-c",
            str(source),
            "-o",
            str(objects[-1]),
        ]
        _check(command)
    executable = folder / program
    _check(["g++", *FLAGS, *map(str, objects), "-o", str(executable)])
    return _check([str(executable), *arguments])


def _check(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout
