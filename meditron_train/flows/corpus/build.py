"""`corpus build` to the end: the corpus, its tokens, and the data section that trains on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meditron_train.config.load import dump_config
from meditron_train.config.yaml_file import dump_yaml
from meditron_train.corpus.declaration import Corpus, TokenizeSection
from meditron_train.corpus.json_files import write_json
from meditron_train.corpus.manifest import (
    DOCUMENTS_SCHEMA,
    Dataset,
    FinishedCorpus,
    count_licenses,
    file_hashes,
    locked,
)
from meditron_train.data.meta import read_meta
from meditron_train.data.tokenizing.encode import TokenizeOptions
from meditron_train.data.tokenizing.tokenize import tokenize
from meditron_train.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from meditron_train.data.tokenizing.train import train_tokenizer
from meditron_train.errors import MeditronError
from meditron_train.files import replace_text, replacing
from meditron_train.log import get_logger

_log = get_logger(__name__)


def build_corpus(
    corpus: Corpus, build: Callable[[], dict[str, Any]], *, workers: int, show_progress: bool = False
) -> dict[str, Any]:
    """Run `build`, tokenize what it wrote where the declaration wants it, and return the manifest.

    Raises:
        UserError: the tokenizer is wrong; found before anything is built.
    """
    section = corpus.tokenize
    if section.tokenizer is not None:
        load_tokenizer(section.tokenizer, section.special_tokens)
    build()
    finished = FinishedCorpus.open(corpus.output)
    return finish_corpus(finished, corpus, workers=workers, show_progress=show_progress)


def finish_corpus(
    finished: FinishedCorpus, corpus: Corpus, *, workers: int, show_progress: bool = False
) -> dict[str, Any]:
    """Tokenize a corpus and complete its manifest: tokens of each document and source, data.yaml, hashes."""
    with locked(finished.root):
        manifest = copy.deepcopy(finished.manifest)
        section = corpus.tokenize
        directory = section.tokenizer or _trained(finished, section.train_vocab_size)
        if directory is not None:
            tokenizer = load_tokenizer(directory, section.special_tokens)
            record = {
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
                "special_tokens": list(section.special_tokens),
            }
            for dataset in finished.datasets:
                _tokenize(dataset, section, tokenizer, workers, show_progress)
                _counts(manifest, dataset)["tokens"] = _count_tokens(dataset)
            manifest["tokenizer"] = record
            _write_data_section(finished, corpus, directory, manifest)
        for source in manifest["sources"]:
            datasets = [dataset for dataset in finished.datasets if dataset.source == source["name"]]
            source["licenses"] = count_licenses(datasets)
        # The same file wherever it is built.
        dump_config(
            corpus.model_copy(update={"output": Path(finished.root.name)}), finished.root / "corpus.yaml"
        )
        manifest["files"] = file_hashes(finished.root)
        if manifest != finished.manifest:
            write_json(finished.manifest_path, manifest)
    return manifest


def _trained(finished: FinishedCorpus, vocab_size: int | None) -> Path | None:
    """Directory of the tokenizer that is trained on the corpus; None where none is wanted."""
    if vocab_size is None:
        return None
    directory = finished.root / "tokenizer"
    if not (directory / "tokenizer.model").is_file():
        texts = [dataset.documents for dataset in finished.datasets if dataset.split == "train"]
        train_tokenizer(texts, directory, vocab_size=vocab_size)
    return directory


def _tokenize(
    dataset: Dataset, section: TokenizeSection, tokenizer: Tokenizer, workers: int, show_progress: bool
) -> None:
    """Write the .bin and .idx of a dataset, unless they are there and made with this tokenizer."""
    known = read_meta(dataset.tokenized)
    if known is not None and known["tokenizer"]["fingerprint"] == tokenizer.fingerprint:
        return
    options = TokenizeOptions(str(tokenizer.directory), section.special_tokens)
    dataset.tokenized.parent.mkdir(exist_ok=True)
    tokenize(
        [dataset.documents],
        dataset.tokenized,
        options,
        workers=workers,
        strict=True,
        overwrite=True,
        show_progress=show_progress,
        check_every=section.check_every if section.fast else 0,
    )


def _count_tokens(dataset: Dataset) -> int:
    """Write the number of tokens of each document into its row of the manifest; returns their sum."""
    from meditron_train.data.indexed import IndexedDataset  # with all of torch: only where there are tokens

    lengths = IndexedDataset(dataset.tokenized).document_lengths
    first = 0
    with pq.ParquetFile(dataset.manifest) as file, replacing(dataset.manifest) as target:
        if file.metadata.num_rows != len(lengths):
            raise MeditronError(
                f"{dataset.tokenized} has {len(lengths)} documents, but {dataset.manifest} has "
                f"{file.metadata.num_rows}: remove the former and run the command again"
            )
        with pq.ParquetWriter(target, DOCUMENTS_SCHEMA) as writer:
            column = DOCUMENTS_SCHEMA.get_field_index("num_tokens")
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                part = np.asarray(lengths[first : first + table.num_rows], np.int64)
                writer.write_table(table.set_column(column, DOCUMENTS_SCHEMA.field(column), pa.array(part)))
                first += table.num_rows
    return int(lengths.sum())


def _counts(manifest: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    source = next(source for source in manifest["sources"] if source["name"] == dataset.source)
    counts: dict[str, Any] = source["splits"][dataset.split]
    return counts


def _write_data_section(
    finished: FinishedCorpus, corpus: Corpus, tokenizer: Path, manifest: dict[str, Any]
) -> None:
    """data.yaml: the data section of a training configuration. phases.yaml: its data.phases, if any are declared.

    With phases the sources have weights, as `data.phases` wants it: the tokens that they would have as a budget. A
    phase leaves out sources that contributed nothing, and is left out itself where nothing remains.
    """
    datasets = {(dataset.source, dataset.split): dataset for dataset in finished.datasets}
    train: list[dict[str, Any]] = []
    for source in corpus.sources:
        dataset = datasets.get((source.name, "train"))
        if dataset is None:
            continue
        tokens = round(_counts(manifest, dataset)["tokens"] * (source.weight or 1.0))
        train.append(
            {
                "name": source.name,
                "path": str(dataset.tokenized),
                "weight" if corpus.phases else "token_budget": source.token_budget or max(tokens, 1),
            }
        )
    validation = [
        {"name": source.name, "path": str(datasets[source.name, "validation"].tokenized)}
        for source in corpus.sources
        if (source.name, "validation") in datasets
    ]
    data: dict[str, Any] = {
        "tokenizer": str(tokenizer),
        "special_tokens": list(corpus.tokenize.special_tokens),
        "train": train,
        "validation": validation,
    }
    _write_yaml(finished.root / "data.yaml", {"data": data})
    names = {entry["name"] for entry in train}
    phases = []
    for phase in corpus.phases:
        weights = {name: weight for name, weight in phase.weights.items() if name in names}
        if any(weights.values()):
            phases.append({"from_step": phase.from_step, "weights": weights})
        else:
            _log.warning(
                "the phase from step %d is left out: it has no source with documents", phase.from_step
            )
    if phases:
        _write_yaml(finished.root / "phases.yaml", {"data": {"phases": phases}})


def _write_yaml(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, dump_yaml(values))
