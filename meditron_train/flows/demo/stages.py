"""The stages of the demo, each a function from files to files."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meditron_train.corpus.miniature.questions import Question, build_questions
from meditron_train.corpus.miniature.texts import Text, general_texts, medical_texts
from meditron_train.corpus.miniature.trials import trial_questions
from meditron_train.corpus.miniature.world import World, build_world
from meditron_train.errors import MeditronError, UserError
from meditron_train.files import shipped

if TYPE_CHECKING:
    from meditron_train.data.packed import PackedBatch

CONFIG = shipped("configs") / "demo.yaml"
LOSS_TOLERANCE = 1e-4  # nats per token, between fp32 sums in different orders


@dataclass(frozen=True)
class DemoSizes:
    """How large the experiment is; the continued pretraining's own sizes are in configs/demo.yaml."""

    num_drugs: int = 76
    num_diseases: int = 48
    num_general_texts: int = 8000
    num_medical_texts: int = 4000
    num_validation_texts: int = 200
    num_trials: int = 200  # to be asked about; twice as many to finetune on
    vocab_size: int = 1536
    hidden_size: int = 128
    num_layers: int = 4
    base_steps: int = 200
    overrides: tuple[str, ...] = ()  # further section.field=value for both trainings


@dataclass(frozen=True)
class DemoFiles:
    """Where everything lies under the demo's directory."""

    root: Path

    @property
    def texts(self) -> Path:
        return self.root / "texts"

    @property
    def questions(self) -> Path:
        return self.root / "questions"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def base_run(self) -> Path:
        return self.root / "base-pretraining"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def continued_run(self) -> Path:
        return self.root / "continued"

    @property
    def result(self) -> Path:
        return self.continued_run / "hf"

    @property
    def report(self) -> Path:
        return self.root / "report.json"


def write_world(files: DemoFiles, sizes: DemoSizes, seed: int) -> tuple[list[Question], list[Question]]:
    """Invent the world and write its texts and questions; returns the questions on taught and on held-out facts."""
    world = build_world(seed, num_drugs=sizes.num_drugs, num_diseases=sizes.num_diseases)
    files.texts.mkdir()
    files.questions.mkdir()
    _write_texts(files, "general", general_texts(world, sizes.num_general_texts, seed=1))
    medical = sizes.num_medical_texts + sizes.num_validation_texts
    _write_texts(files, "medical", medical_texts(world, medical, seed=1))
    _write_trials(files, world, sizes.num_trials)
    return _write_questions(files, world, "taught"), _write_questions(files, world, "held_out")


def train_tokenizer(files: DemoFiles, vocab_size: int) -> None:
    """A sentencepiece BPE model of Llama's kind, trained on the general text."""
    from meditron_train.data.tokenizing.train import train_tokenizer as train

    train([files.texts / "general.jsonl"], files.tokenizer, vocab_size=vocab_size)


def build_texts(files: DemoFiles, sizes: DemoSizes) -> dict[str, dict[str, int]]:
    """The texts as a corpus under data/, tokenized; returns documents and tokens by dataset.

    The filters of single documents and near-duplicates are switched off: invented texts are short and made
    from a few
    patterns, so that they would all be found alike. Exact duplicates go, so that no text is on both sides of
    the split.

    Raises:
        UserError: datatrove is not installed.
    """
    if importlib.util.find_spec("datatrove") is None:
        raise UserError("the demo builds its corpus with datatrove: pip install 'meditron-train[corpus]'")
    from meditron_train.corpus.declaration import Corpus
    from meditron_train.corpus.pipeline.build import build
    from meditron_train.flows.corpus.build import build_corpus

    held_out = sizes.num_validation_texts / (sizes.num_medical_texts + sizes.num_validation_texts)
    corpus = Corpus.model_validate(
        {
            "name": "miniature",
            "title": "Texts of an invented world",
            "output": files.data,
            "sources": [
                _source(files, "medical", "guidelines", held_out),
                _source(files, "general", "replay", 0.0),
            ],
            "filters": {name: {"enabled": False} for name in ("length", "language", "repetition", "quality")},
            "dedup": {"near": {"enabled": False}},
            "tokenize": {"tokenizer": files.tokenizer, "special_tokens": []},
        }
    )
    manifest = build_corpus(corpus, lambda: build(corpus), workers=1)
    # Short names, to be typed: data/medical is the training split.
    for path in (files.data / "tokenized").iterdir():
        source, split, extension = path.name.split(".", 2)
        stem = source if split == "train" else f"{source}-{split}"
        (files.data / f"{stem}.{extension}").symlink_to(path.relative_to(files.data))
    return {
        f"{source['name']}.{split}": counts
        for source in manifest["sources"]
        for split, counts in source["splits"].items()
        if counts["documents"]
    }


def _source(files: DemoFiles, name: str, part: str, validation: float) -> dict[str, Any]:
    return {
        "name": name,
        "part": part,
        "reader": "jsonl",
        "path": files.texts / f"{name}.jsonl",
        "options": {"id_key": "id", "metadata": {"kind": "kind"}},
        "license": "CC0-1.0",
        "redistribution": True,
        "citation": "Invented by the demo",
        "validation": validation,
    }


def train_base(files: DemoFiles, sizes: DemoSizes) -> None:
    """Pretrain a small Llama from random weights on the general text; it becomes the Hugging Face directory base/."""
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.hidden_size * 8 // 3 // 16 * 16,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    general = {"name": "general", "path": str(files.data / "tokenized" / "general.train")}
    run_training(
        files,
        num_processes=2,
        overrides=[
            "model.from=null",
            "model.init=random",
            f"model.hf_config={json.dumps(shape)}",
            f"data.tokenizer={files.tokenizer}",
            f"data.train={json.dumps([general])}",
            "data.validation=[]",
            f"train.steps={sizes.base_steps}",
            f"logging.run_dir={files.base_run}",
            *sizes.overrides,
        ],
    )
    (files.base_run / "hf").rename(files.base)


def continue_pretraining(files: DemoFiles, sizes: DemoSizes) -> None:
    """Continue the base's pretraining on the medical text in four processes: two stages of two ranks each."""
    overrides = [f"logging.run_dir={files.continued_run}", "parallel.tensor=2", "parallel.pipeline=2"]
    run_training(files, num_processes=4, overrides=[*overrides, *sizes.overrides])


def run_training(files: DemoFiles, *, num_processes: int, overrides: Sequence[str]) -> None:
    """Train as a user would: configs/demo.yaml, overrides, several processes.

    Raises:
        MeditronError: the training fails.
    """
    command = [sys.executable, "-m", "meditron_train", "train", str(CONFIG), *overrides]
    command += ["--processes", str(num_processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DEMO_DIR": str(files.root)}
    code = subprocess.run(command, env=environment, check=False).returncode
    if code != 0:
        raise MeditronError(
            f"the training ended with exit code {code}; its messages are above. It was: {shlex.join(command)}"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: in so small a model, threads mostly wait for each other."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@one_thread()
def check_result(files: DemoFiles) -> dict[str, Any]:
    """Compare the exported model with the run that made it.

    Its tensors must equal those of the last checkpoint bit for bit. And transformers, which reads each
    validation document alone, must find the loss that the four training processes found on the packed
    documents.

    Raises:
        MeditronError: they differ.
    """
    from meditron_train.config.load import load_config
    from meditron_train.data.packed import build_validation_datasets
    from meditron_train.data.sources import vocabulary
    from meditron_train.evaluate.language_model import load_language_model
    from meditron_train.evaluate.likelihood import perplexity
    from meditron_train.report.json_lines import read_json_lines
    from meditron_train.verify.verify import verify

    checkpoints = files.continued_run / "checkpoints"
    checkpoint = checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()
    comparison = verify(checkpoint, files.result)
    if comparison.differences:
        raise MeditronError(f"{files.result} is not the model in {checkpoint}: {comparison.differences[0]}")

    config = load_config(files.continued_run / "config.yaml")
    dataset = build_validation_datasets(config.data, config.train.seq_len, vocabulary(config.data))["medical"]
    last = read_json_lines(files.continued_run / "metrics.jsonl")[-1]
    batch_size = config.train.global_batch_size
    num_steps = min(config.validation.steps, max(1, dataset.samples_per_epoch // batch_size))
    documents = packed_documents(dataset.microbatch(list(range(num_steps * batch_size))))
    loss = math.log(perplexity(load_language_model(files.result), documents))
    if not abs(loss - last["validation_loss.medical"]) <= LOSS_TOLERANCE:
        raise MeditronError(
            f"transformers finds a validation loss of {loss:.6f} for {files.result}, the training found "
            f"{last['validation_loss.medical']:.6f}"
        )
    return {
        "num_equal_tensors": comparison.num_tensors,
        "num_validation_tokens": sum(len(document) - 1 for document in documents),
        "loss_in_transformers": loss,
        "loss_in_training": last["validation_loss.medical"],
    }


def packed_documents(batch: PackedBatch) -> list[list[int]]:
    """The documents in a packed batch, each as the token ids that are read and predicted."""
    documents = []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        if not batch.loss_mask_T[start:end].any():
            continue  # padding
        document = batch.tokens_T[start:end].tolist()
        if batch.loss_mask_T[end - 1]:
            # A long document was cut here: its next token is predicted.
            document.append(int(batch.labels_T[end - 1]))
        documents.append(document)
    return documents


@one_thread()
def evaluate(files: DemoFiles, questions: dict[str, list[Question]]) -> dict[str, Any]:
    """Accuracy by likelihood and perplexity, of the base and of the result."""
    from meditron_train.data.indexed import IndexedDataset
    from meditron_train.evaluate.language_model import load_language_model
    from meditron_train.evaluate.likelihood import multiple_choice_accuracy, perplexity

    validation = IndexedDataset(files.data / "tokenized" / "medical.validation")
    documents = [validation.document(number).tolist() for number in range(validation.num_documents)]
    accuracies: dict[str, dict[str, Any]] = {
        name: {"num_questions": len(asked)} for name, asked in questions.items()
    }
    perplexities = {}
    for when, directory in (("before", files.base), ("after", files.result)):
        model = load_language_model(directory)
        for name, asked in questions.items():
            result = multiple_choice_accuracy(model, asked)
            accuracies[name]["chance"] = result.chance
            accuracies[name][when] = {
                "accuracy": result.by_sum.value,
                "interval": result.by_sum.interval,
                "accuracy_by_bytes": result.by_normalized.value,
            }
        perplexities[when] = perplexity(model, documents)
    return {"questions": accuracies, "perplexity": perplexities}


def _write_texts(files: DemoFiles, name: str, texts: Iterable[Text]) -> None:
    _write_lines(files.texts / f"{name}.jsonl", (asdict(text) for text in texts))


def _write_questions(files: DemoFiles, world: World, which: str) -> list[Question]:
    questions = build_questions(world, getattr(world, which), seed=1)
    name = which.replace("_", "-")
    _write_lines(files.questions / f"{name}.jsonl", (asdict(question) for question in questions))
    return questions


def _write_trials(files: DemoFiles, world: World, number: int) -> None:
    """As `evaluate --data questions` finds PubMedQA; the demo itself does not ask them."""
    (files.questions / "pubmedqa").mkdir()
    _write_lines(files.questions / "pubmedqa" / "train.jsonl", trial_questions(world, 2 * number, seed=1))
    _write_lines(files.questions / "pubmedqa" / "test.jsonl", trial_questions(world, number, seed=2))


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
