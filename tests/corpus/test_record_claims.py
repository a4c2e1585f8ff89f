"""Who keeps an id: against the rule written out record by record."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from meditron_train.corpus import record_claims
from meditron_train.corpus.document import Reason, Shard
from meditron_train.corpus.record_claims import Claim, load_losers, resolve, text_digest, write_claims


def losers_of(directory: Path, shards: list[list[Claim]]) -> list[dict[int, str]]:
    """What resolve says of each shard: position -> reason and winner."""
    paths = [directory / f"{number}.claims" for number in range(len(shards))]
    for path, claims in zip(paths, shards, strict=True):
        assert write_claims(path, claims) == len(claims)
    out = directory / "losers"
    out.mkdir()
    names = [Shard(f"file {number}", ()) for number in range(len(shards))]
    total = resolve(paths, names, out)
    found = []
    for number, claims in enumerate(shards):
        losers = load_losers(out, number)
        losses = {claim.position: losers.get(claim.position) for claim in claims if not claim.deletes}
        found.append({position: f"{loss.reason}: {loss}" for position, loss in losses.items() if loss})
    assert total == sum(map(len, found))
    return found


def test_each_kind_of_loss(tmp_path):
    shards = [
        [
            Claim(1, 0, revises=True),  # revised in the next file
            Claim(2, 1, revises=True),  # deleted in the last
            Claim(3, 2, version=1, revises=True),  # version 2 follows
            Claim(4, 3, revises=True, digest=5),  # twice in one file
            Claim(4, 4, revises=True, digest=6),
            Claim(5, 5, revises=True),  # deleted, and then there again
        ],
        [Claim(1, 0, revises=True), Claim(3, 1, version=2, revises=True), Claim(5, 2, deletes=True)],
        [Claim(2, 0, deletes=True), Claim(5, 1, revises=True)],
    ]
    assert losers_of(tmp_path, shards) == [
        {
            0: "superseded: replaced by record 0 of file 1",
            1: "deleted: deleted by record 0 of file 2",
            2: "superseded: replaced by record 1 of file 1",
            3: "duplicate_id: the same id as record 4 of file 0 with different text, which is kept",
            5: "superseded: replaced by record 1 of file 2",
        },
        {},
        {},
    ]


def test_a_deleted_version_leaves_the_other(tmp_path):
    shards = [[Claim(7, 0, version=1), Claim(7, 1, version=2)], [Claim(7, 0, version=2, deletes=True)]]
    assert losers_of(tmp_path, shards) == [{1: "deleted: deleted by record 0 of file 1"}, {}]


def test_text_ids_that_clash(tmp_path):
    same, other = text_digest("one text"), text_digest("another")
    shards = [
        [Claim("a", 0, digest=same), Claim("b", 1, digest=same)],
        [Claim("a", 0, digest=same), Claim("b", 1, digest=other)],
    ]
    assert losers_of(tmp_path, shards)[0] == {
        0: "duplicate_id: the same id as record 0 of file 1 with the same text, which is kept",
        1: "duplicate_id: the same id as record 1 of file 1 with different text, which is kept",
    }


def by_hand(shards: list[list[Claim]]) -> list[dict[int, Reason]]:
    """The rule, one id at a time."""
    events: dict[int, dict[int, list[tuple[int, Claim]]]] = {}
    for number, claims in enumerate(shards):
        for claim in claims:
            events.setdefault(claim.key, {}).setdefault(claim.version, []).append((number, claim))
    lost: list[dict[int, Reason]] = [{} for _ in shards]
    for versions in events.values():
        left = [version for version, said in versions.items() if not said[-1][1].deletes]
        for version, said in versions.items():
            for number, claim in said:
                if claim.deletes:
                    continue
                if version not in left:
                    lost[number][claim.position] = Reason.DELETED
                elif version != max(left):
                    lost[number][claim.position] = Reason.SUPERSEDED
                elif claim is not said[-1][1]:
                    revised = said[-1][1].revises and said[-1][0] != number
                    lost[number][claim.position] = Reason.SUPERSEDED if revised else Reason.DUPLICATE_ID
    return lost


@pytest.mark.parametrize("seed", range(3))
def test_many_claims_in_small_runs_and_ranges(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(record_claims, "RUN_CLAIMS", 100)
    monkeypatch.setattr(record_claims, "RANGE_CLAIMS", 250)
    random = Random(seed)
    shards = [
        [
            Claim(
                random.randrange(2 ** random.choice([9, 60])),
                position,
                random.randrange(1, 3),
                random.random() < 0.1,
                True,
            )
            for position in range(random.randrange(700))
        ]
        for _ in range(5)
    ]
    found = losers_of(tmp_path, shards)
    said = [{position: Reason(text.split(":")[0]) for position, text in losses.items()} for losses in found]
    assert said == by_hand(shards)


def test_nothing_to_resolve(tmp_path):
    assert losers_of(tmp_path, [[], []]) == [{}, {}]
