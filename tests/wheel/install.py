"""Install the wheel alone, in environments of their own outside of the repository, and take the tour in each.

    python -m tests.wheel.install pinned           the versions of constraints.txt
    python -m tests.wheel.install lowest newest    the lowest that pyproject.toml allows, and what pip chooses itself

None of our extras is installed, so that a dependency that only a developer has shows. Environments and wheel are made
in a temporary directory. Where the lowest or the newest torch is at hand as a CUDA build alone, that is a download of
gigabytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(*words: object, cwd: Path = ROOT) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    print("wheel:", *words, flush=True)
    subprocess.run([str(word) for word in words], cwd=cwd, env=environment, check=True)


def build(directory: Path) -> Path:
    """The wheel, built from a copy of what git tracks: it must not need, nor pick up, what lies about here."""
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            target = directory / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", directory)
    run(sys.executable, "-m", "pip", "wheel", *options, directory / "source")
    (wheel,) = directory.glob("*.whl")
    return wheel


def lowest(directory: Path) -> Path:
    """A requirements file with the lowest versions of what we depend on."""
    requirements = directory / "lowest.txt"
    options = ("--quiet", "--resolution", "lowest-direct", "--output-file", requirements)
    run(BIN / "uv", "pip", "compile", *options, ROOT / "pyproject.toml")
    return requirements


def install(directory: Path, wheel: Path, versions: str) -> Path:
    """The Python of a new environment."""
    run(sys.executable, "-m", "venv", directory / "venv")
    python = directory / "venv/bin/python"
    constraints = {
        "pinned": lambda: ("-c", ROOT / "constraints.txt"),
        "lowest": lambda: ("-c", lowest(directory)),
        "newest": lambda: ("--upgrade",),
    }[versions]()
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *constraints, wheel)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", choices=["pinned", "lowest", "newest"])
    with tempfile.TemporaryDirectory(prefix="meditron-wheel-") as name:
        wheel = build(Path(name))
        for versions in parser.parse_args().versions:
            started = time.monotonic()
            directory = Path(name, versions)
            (directory / "tour").mkdir(parents=True)
            python = install(directory, wheel, versions)
            shutil.copy(Path(__file__).with_name("tour.py"), directory)
            run(python, directory / "tour.py", directory / "tour", cwd=directory)
            shutil.rmtree(directory)
            print(f"wheel: {versions} versions passed in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
