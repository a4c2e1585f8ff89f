"""Near-duplicates by MinHash: datatrove's stages for signatures and buckets, and a clustering of ours.

datatrove's clustering recurses, and keeps whichever member has the largest set under it. Here a cluster is represented
by its first document in the order of priority, so a guideline outlives its copies in papers and web text.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import _mersenne_prime
from datatrove.utils.text import TextNormConfig, ngrams, simplify_text
from numpy.typing import NDArray

from meditron_train.corpus.declaration import MinHash
from meditron_train.corpus.json_files import read_json_lines
from meditron_train.corpus.pipeline.fates import Fate, Fates
from meditron_train.corpus.pipeline.index import Index
from meditron_train.corpus.pipeline.plan import Unit
from meditron_train.corpus.pipeline.store import ProgressFile
from meditron_train.corpus.pipeline.words import SpacedWords, pieces
from meditron_train.corpus.pipeline.work import whole_directory
from meditron_train.corpus.pipeline.worker import CorpusStep, prepare_worker

_BLOCK = 4096
_PIECE_CHARS = 1 << 17
_PAIR = struct.Struct("<4I")


def minhash_config(section: MinHash) -> MinhashConfig:
    return MinhashConfig(
        n_grams=section.n_grams,
        num_buckets=section.buckets,
        hashes_per_bucket=section.hashes,
        seed=section.seed,
    )


class BoundedSignature(MinhashDedupSignature):
    """datatrove's signatures, in blocks of shingles: its own would need 1 KB for each word of a document at once."""

    def get_shingles(self, text: str) -> Any:
        norm: TextNormConfig = self.config.norm_config
        if text.isascii():
            norm = replace(norm, norm_unicode_diacritics=False)  # there are none, and looking is slow
        split = self.word_tokenizer.word_tokenize
        tokens = chain.from_iterable(split(simplify_text(p, norm)) for p in pieces(text, _PIECE_CHARS))
        hashes = (self._hash_func(" ".join(gram)) for gram in ngrams(tokens, self.config.n_grams))
        return np.fromiter(hashes, dtype=np.uint64).reshape((-1, 1))

    def get_signature(self, shingles: Any) -> list[list[int]]:
        factors, summands = self.parameters
        least = np.full(self.num_hashes, np.iinfo(np.uint64).max, np.uint64)
        for first in range(0, len(shingles), _BLOCK):
            values = (shingles[first : first + _BLOCK] * factors + summands) % _mersenne_prime
            if self.config.hash_config.precision == 32:
                values = np.bitwise_and(values, self.config.hash_config.max)
            np.minimum(least, values.min(axis=0), out=least)
        parts = np.split(least.astype(self.config.hash_config.np_dtype), self.config.num_buckets)
        return [part.tolist() for part in parts]


class SignUnits(CorpusStep):
    """Signatures of units rank, rank + tasks, ...; datatrove's number of a document is its position in the unit."""

    name = "MinHash signatures"
    STAGE = "sign"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        prepare_worker()
        progress = ProgressFile(self._work.progress(self.STAGE), rank)
        config = minhash_config(self._plan.corpus.dedup.near)
        for unit in self._plan.units[rank::world_size]:
            done = self._work.signatures / f"unit_{unit.number:05d}"
            if done.exists():
                continue
            self._work.signatures.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix="making_", dir=self._work.signatures) as directory:
                documents = self._documents(unit, progress)
                BoundedSignature(directory, config, language=SpacedWords()).run(documents, unit.number)
                for path in sorted(Path(directory).glob("bucket_*/*.sig")):
                    target = self._work.signatures / path.parent.name / path.name
                    target.parent.mkdir(exist_ok=True)
                    path.replace(target)
            done.touch()
        progress.end()
        yield from ()

    def _documents(self, unit: Unit, progress: ProgressFile) -> Iterator[Document]:
        """All documents of a unit; those that are dropped already without text, which gives them no signature."""
        fates = Fates.load(self._work.fates)
        number = Index(self._plan, self._work).offsets[unit.first]
        for shard in unit.shards:
            for record in read_json_lines(self._work.shard(shard) / "documents.jsonl.zst"):
                kept = fates.fate[number] == Fate.KEPT
                yield Document(text=record["text"] if kept else "", id=record["id"])
                progress.add()
                number += 1


class PairBuckets(CorpusStep):
    """Pairs of documents that meet in a bucket: datatrove's second stage, one task for each bucket."""

    name = "MinHash buckets"
    STAGE = "pair"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        prepare_worker()
        progress = ProgressFile(self._work.progress(self.STAGE), rank)
        section = self._plan.corpus.dedup.near
        for bucket in range(rank, section.buckets, world_size):
            if (self._work.pairs / f"{bucket:05d}").is_dir():
                continue
            with whole_directory(self._work.pairs / f"{bucket:05d}") as directory:
                step = MinhashDedupBuckets(
                    str(self._work.signatures),
                    str(directory),
                    config=minhash_config(section),
                    lines_to_buffer=1024,
                )
                step.run(None, bucket, section.buckets)
        progress.end()
        yield from ()


def drop_near_duplicates(index: Index, fates: Fates) -> None:
    """Of every cluster of documents connected by pairs, keep the first in the order of priority."""
    firsts = [index.offsets[unit.first] for unit in index.plan.units]
    members, roots = connected(sorted(index.work.pairs.glob("*/*.dups")), firsts, index.num_documents)
    dropped = members != roots
    fates.drop(members[dropped], Fate.NEAR_DUPLICATE, roots[dropped])


def connected(
    pairs: Sequence[Path], first_of_unit: Sequence[int], num_documents: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The documents that occur in the files of pairs, and for each the smallest number that it is connected with.

    Union-find over one array of document numbers, in which a root is the smallest number of its set: the
    pairs stream through it in any order, to the same result.

    Args:
        pairs: the files.
        first_of_unit: the number of the first document of each unit.
        num_documents: of all units together.
    """
    parents = array("q", range(num_documents))
    seen = bytearray(num_documents)

    def root(document: int) -> int:
        while parents[document] != document:
            parents[document] = parents[parents[document]]
            document = parents[document]
        return document

    for path in pairs:
        with open(path, "rb") as file:
            while block := file.read(_PAIR.size * _BLOCK):
                for unit_a, position_a, unit_b, position_b in _PAIR.iter_unpack(block):
                    a = first_of_unit[unit_a] + position_a
                    b = first_of_unit[unit_b] + position_b
                    root_a, root_b = root(a), root(b)
                    if root_a != root_b:
                        parents[max(root_a, root_b)] = min(root_a, root_b)
                    seen[a] = seen[b] = 1
    members = np.flatnonzero(np.frombuffer(seen, np.uint8)).astype(np.int64)
    return members, np.array([root(member) for member in members.tolist()], np.int64)
