"""Duplicates that the indexes alone reveal: equal content, and abstracts of papers that are there."""

from __future__ import annotations

import numpy as np

from meditron_train.corpus.pipeline.fates import Fate, Fates, groups_of_equals
from meditron_train.corpus.pipeline.index import IDENTIFIERS, Index


def drop_equal_content(index: Index, fates: Fates) -> None:
    """Of documents with the same normalized text, keep the first."""
    for (low, high), numbers in index.parts(("content_low", "content_high")):
        alive = fates.is_kept(numbers)
        low, high, numbers = low[alive], high[alive], numbers[alive]
        order = np.lexsort((numbers, high, low))
        low, high, numbers = low[order], high[order], numbers[order]
        for group in groups_of_equals(low, high):
            members = numbers[group]
            fates.drop(members[1:], Fate.EXACT_DUPLICATE, np.full(len(members) - 1, members[0]))


def drop_abstracts_of_papers(index: Index, fates: Fates) -> None:
    """Drop abstracts whose PMID, PMCID or DOI a paper has.

    To be called before papers are dropped, so that no two documents stand for each other.
    """
    parts = {shard.number: index.plan.source(shard.source).part for shard in index.plan.shards}
    if not {"abstracts", "papers"} <= set(parts.values()):
        return
    papers = np.array([parts[shard.number] == "papers" for shard in index.plan.shards])
    offsets = np.array(index.offsets[1:])
    for name in IDENTIFIERS:
        columns = (f"{name}_hash",)
        for (hashes,), numbers in index.parts(columns, lambda shard: parts[shard] in ("abstracts", "papers")):
            present = hashes != 0
            hashes, numbers = hashes[present], numbers[present]
            is_paper = papers[np.searchsorted(offsets, numbers, side="right")]
            known, first = np.unique(hashes[is_paper], return_index=True)
            candidates = ~is_paper & fates.is_kept(numbers)
            hashes, abstracts = hashes[candidates], numbers[candidates]
            found = np.searchsorted(known, hashes)
            hit = found < len(known)
            hit[hit] = known[found[hit]] == hashes[hit]
            fates.drop(abstracts[hit], Fate.FULL_TEXT, numbers[is_paper][first[found[hit]]])
