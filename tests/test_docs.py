from __future__ import annotations

from pathlib import Path

import pytest

from tests import docs_check

ROOT = Path(__file__).parents[1]


def test_no_line_is_too_long_and_every_link_leads_somewhere():
    problems = docs_check.prose_problems(ROOT)
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.long
def test_the_documents_of_this_repository():
    assert docs_check.documents(ROOT), "README.md is missing"
    problems = docs_check.check(ROOT, run=False)  # `make docs-check` runs what is marked
    assert not problems, "\n" + "\n".join(problems)


@pytest.fixture
def repository(tmp_path):
    """A small repository; the returned function writes its README and gives the problems found in it."""
    (tmp_path / "Makefile").write_text("VENV := .venv\n.PHONY: demo\ndemo: x\n\techo\ndocs-check:\n\techo\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/guide.md").write_text("guide\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/run.yaml").write_text(
        "model: {from: base}\ndata: {tokenizer: base, train: [{name: a, path: a}]}\n"
    )

    def problems(text: str) -> list[str]:
        (tmp_path / "README.md").write_text(text)
        return docs_check.check(tmp_path)

    return problems


def bash(*lines: str) -> str:
    return "\n".join(["# Title", "```bash", *lines, "```"])


@pytest.mark.parametrize(
    "line",
    [
        "make demo",
        "VENV=x make docs-check && make demo",
        "meditron-train --help",
        "meditron-train --version  # a comment",
        "meditron-train doctor --json | jq .",
        "python -m meditron_train doctor \\\n    --json",
        "srun --ntasks 4 meditron-train doctor",
        "torchrun --nproc-per-node 4 -m meditron_train doctor",
        "git clone URL && cd meditron-train",
        "python -m pytest",
        "sbatch --nodes 4 launch/YOUR_SCRIPT.sbatch",
    ],
)
def test_true_commands_pass(repository, line):
    assert repository(bash(line)) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("make tea", "the Makefile has no target tea"),
        ("meditron-train fly", "there is no command 'fly'"),
        ("meditron-train doctor --jsno", "No such option"),
        ("meditron-train", "Missing command|a verb is missing|Usage"),
        ("python -m meditron_train doctor extra", "unexpected extra argument"),
        ("torchrun --nproc-per-node 4 -m meditron_train fly", "there is no command 'fly'"),
        ("torchrun --nproc-per-node 4 train.py", "torchrun starts no meditron_train"),
        ("python -m no_such_module_here", "there is no module no_such_module_here"),
        ("python benchmarks/none.py", "there is no benchmarks/none.py"),
        ("sbatch launch/none.sbatch", "there is no launch/none.sbatch"),
        ("pytest tests/none.py::test_x", "there is no tests/none.py"),
        ("frobnicate --all", "unknown program 'frobnicate'"),
    ],
)
def test_false_commands_are_found(repository, line, said):
    (problem,) = repository(bash("", line))
    assert problem.startswith("README.md:4: ")
    assert any(part in problem for part in said.split("|"))


def test_configurations_and_overrides_are_loaded(repository, tmp_path):
    def problem(*arguments: str) -> str | None:
        return docs_check.config_problem(["train", *arguments], tmp_path)

    assert problem("configs/run.yaml", "train.steps=3") is None
    assert problem("CONFIG.yaml") is None
    assert problem("configs/none.yaml") == "there is no configs/none.yaml"
    assert "did you mean train.steps?" in (problem("configs/run.yaml", "train.step=3") or "")


def test_blocks_of_other_languages_are_left_alone(repository):
    assert repository("```python\nfrobnicate()\n```\n```\nfrobnicate\n```\n") == []


def test_console_blocks_hold_commands_and_output(repository):
    text = "```console\n$ make demo\nfrobnicated 3 files\n$ make tea\n```"
    (problem,) = repository(text)
    assert problem.startswith("README.md:4: ")


def test_links_and_paths(repository):
    assert repository("[a](docs/guide.md#top) [b](https://example.org/x)") == []
    assert repository("`configs/run.yaml` `configs/run.yaml:3` `configs/*.yaml`") == []
    assert repository("[a](docs/none.md)") == ["README.md:1: the link leads nowhere: docs/none.md"]
    assert repository("see\n`docs/none.md`") == ["README.md:2: there is no docs/none.md"]
    assert repository("`model/none.py` `none.py`") == ["README.md:1: there is no model/none.py"]


def test_marked_blocks_are_run(repository, tmp_path):
    mark = docs_check.RUN_MARK
    assert repository(f"{mark}\n```bash\ncat Makefile\n```") == []
    (problem,) = repository(f"{mark}\n```bash\ncat nothing.txt\n```")
    assert "exit code 1" in problem
    assert "nothing.txt" in problem


def test_prose_is_not_wider_than_the_page(tmp_path):
    from tests.docs_check import long_lines

    file = tmp_path / "a.md"
    wide = "x" * 121
    file.write_text(f"{wide[1:]}\n{wide}\n| {wide} |\n# {wide}\n```\n{wide}\n```\n")
    assert list(long_lines(file, tmp_path)) == ["a.md:2: 121 columns are more than 120"]
