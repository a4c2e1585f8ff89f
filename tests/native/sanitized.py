"""C++ programs compiled with sanitizers and run: a read outside an array, an overflow or a race ends the program.

Python itself is not instrumented: the programs test the C++ of csrc/ directly.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPP = Path(__file__).parent / "cpp"
COMPILER = os.environ.get("CXX", "g++")
COMPILE_WITH = re.compile(r"^// compile with: (.*)$", re.MULTILINE)


def run_sanitized(
    sources: Sequence[Path],
    folder: Path,
    *,
    include: Sequence[Path] = (),
    sanitizers: str = "address,undefined",
    arguments: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> str:
    """Compile the sources (one of them with `main`) into a program in `folder`, run it, and return its output.

    Files that name flags for themselves (`// compile with: `) get them, but for the optimization. Warnings are
    errors; so are reports of the sanitizers. Skips the test where the compiler or its sanitizers are missing.
    """
    if not has_sanitizers(sanitizers):
        pytest.skip(f"{COMPILER} with -fsanitize={sanitizers} does not work here")
    common = [COMPILER, "-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", *flags]
    common += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    objects = [folder / f"{number}.o" for number in range(len(sources))]
    for source, output in zip(sources, objects, strict=True):
        own = COMPILE_WITH.search(source.read_text(encoding="utf-8"))
        own_flags = [flag for flag in own[1].split() if not flag.startswith("-O")] if own else []
        includes = [f"-I{directory}" for directory in (CPP, *include)]
        _compile([*common, *own_flags, *includes, "-c", str(source), "-o", str(output)])
    program = folder / "program"
    _compile([*common, *map(str, objects), "-o", str(program)])
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{program} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _compile(command: list[str]) -> None:
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr


@functools.cache
def has_sanitizers(sanitizers: str) -> bool:
    """Whether a trivial program compiles and runs with them."""
    if shutil.which(COMPILER) is None:
        return False
    compile_ = [COMPILER, "-x", "c++", "-", f"-fsanitize={sanitizers}", "-o"]
    program = f"/tmp/meditron-sanitizer-{os.getpid()}"
    try:
        compiled = subprocess.run(
            [*compile_, program], input=b"int main() {}", capture_output=True, check=False
        )
        return compiled.returncode == 0 and subprocess.run([program], check=False).returncode == 0
    finally:
        Path(program).unlink(missing_ok=True)
