"""The tutorial's own commands, in their order; and that what is learned are the answers, by the loss mask."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.corpus.miniature.trials import FINDINGS, trial_questions
from meditron_train.corpus.miniature.world import build_world
from meditron_train.data.meta import loss_mask_path, meta_path, read_meta
from meditron_train.files import sha256_file
from meditron_train.tasks import formats
from tests.docs_check import blocks

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "tutorial.md"
INSTALL = "pip install"

pytestmark = pytest.mark.timeout(1800)  # the walk


def test_trials_are_rows_of_pubmedqa_and_the_abstract_alone_answers():
    rows = list(trial_questions(build_world(0), 60, seed=1))
    for row in rows:
        item = formats.pubmedqa(row)
        decision = item.options[item.answer]
        drug = row["question"].split()[1]
        said = [
            name
            for name, wordings in FINDINGS.items()
            if any(w.format(x=drug) in item.context for w in wordings)
        ]
        assert said == [decision]
        assert item.explanation
    assert [row["final_decision"] for row in rows].count("yes") == 20
    assert rows == list(trial_questions(build_world(0), 60, seed=1))
    asked = {json.dumps(row["context"]) for row in trial_questions(build_world(0), 60, seed=2)}
    assert asked.isdisjoint(json.dumps(row["context"]) for row in rows)


def shell(text: str, directory: Path) -> None:
    """Run it as bash does, with this environment's meditron-train first in PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=directory,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def commands() -> Iterator[str]:
    yield from (block.text for block in blocks(PAGE) if not block.text.startswith(INSTALL))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every command of the page has been run."""
    pytest.importorskip("datatrove")
    pytest.importorskip("lm_eval")
    directory = tmp_path_factory.mktemp("walk")
    (directory / "tutorial").mkdir()
    for text in commands():
        shell(text, directory)
    return directory


def score(directory: Path, name: str) -> dict:
    [found] = json.loads((directory / "tutorial" / f"{name}.json").read_text())["scores"]
    return found


def invert_loss_mask(source: Path, target: Path) -> None:
    """The same conversations, of which everything but the answers is to be learned."""
    for path in source.parent.glob(f"{source.name}.*"):
        shutil.copy(path, target.with_name(target.name + path.name.removeprefix(source.name)))
    mask = 1 - np.fromfile(loss_mask_path(source), np.uint8)
    mask.tofile(loss_mask_path(target))
    meta = read_meta(source)
    assert meta is not None
    meta["chat"] |= {
        "loss_tokens": int(mask.sum()),
        "loss_mask_sha256": sha256_file(loss_mask_path(target)),
    }
    meta_path(target).write_text(json.dumps(meta))


@pytest.mark.long
@pytest.mark.parametrize("name", ["sft-likelihood", "sft-cot", "sft-sc-cot"])
def test_finetuning_teaches_to_answer(directory: Path, name: str) -> None:
    """By more than either interval: they do not touch."""
    base, after = score(directory, "base-likelihood"), score(directory, name)
    assert after["interval"][0] > base["interval"][1]


@pytest.mark.long
def test_examples_in_the_prompt_teach_less_than_finetuning(directory: Path) -> None:
    assert score(directory, "base-few-shot")["protocol"]["shots"] == 3
    assert (
        score(directory, "base-few-shot")["interval"][1] < score(directory, "sft-likelihood")["interval"][0]
    )


@pytest.mark.long
def test_adapters_alone_teach_it_too(directory: Path) -> None:
    base, after = score(directory, "base-likelihood"), score(directory, "lora-likelihood")
    assert after["interval"][0] > base["interval"][1]


@pytest.mark.long
def test_what_is_published_says_what_it_is(directory: Path) -> None:
    published = directory / "tutorial" / "published"
    assert verify_manifest(published) == []
    card = (published / "README.md").read_text()
    accuracy = score(directory, "sft-likelihood")["accuracy"]
    assert "license: cc0-1.0" in card and f"{100 * accuracy:.1f}" in card


@pytest.mark.long
def test_the_table_has_both_models(directory: Path) -> None:
    table = (directory / "tutorial" / "table.md").read_text()
    assert "| tutorial/demo/continued/hf |" in table
    assert "| tutorial/sft |" in table
    assert "Med-PaLM" in table


@pytest.mark.long
def test_with_an_inverted_loss_mask_it_does_not(directory: Path) -> None:
    invert_loss_mask(directory / "tutorial" / "chat", directory / "tutorial" / "inverted")
    shell(
        "meditron-train train tutorial/sft.yaml data.train.0.path=tutorial/inverted "
        "logging.run_dir=tutorial/sft-inverted\n"
        "meditron-train evaluate tutorial/sft-inverted --chat --tasks pubmedqa --data tutorial/demo/questions "
        "--output tutorial/inverted.json",
        directory,
    )
    inverted, base = score(directory, "inverted"), score(directory, "base-likelihood")
    assert inverted["interval"][0] <= base["interval"][1]
    assert inverted["interval"][1] < score(directory, "sft-likelihood")["interval"][0]
