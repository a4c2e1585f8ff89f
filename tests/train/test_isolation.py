"""Documents packed into one sample do not see each other: neither forward nor backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.distributed import run_ranks
from tests.train.ranks import document_gradients, make_config, start_engine
from tests.train.reference import hf_model, random_batch


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("isolation") / "hf"
    hf_model().save_pretrained(path)
    return path


def with_other_text(batch, document: int):
    """The same packing with every token of one document replaced."""
    start, end = batch.cu_seqlens[document : document + 2].tolist()
    tokens, labels = batch.tokens_T.clone(), batch.labels_T.clone()
    tokens[start:end] = (tokens[start:end] + 17) % 131
    labels[start:end] = (labels[start:end] + 5) % 131
    return replace(batch, tokens_T=tokens, labels_T=labels)


def logits_and_gradients(rank, world_size, config, batches, document):
    return document_gradients(start_engine(rank, world_size, config), batches, document)


LAYOUTS = {
    "tp1": (1, {}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "cp2": (2, {"context": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_document_changes_nothing_in_another(layout, directory):
    world_size, parallel = LAYOUTS[layout]
    config = make_config(directory, {"parallel": parallel})
    batch = random_batch(3)
    changed, watched = 1, 3
    bounds = batch.cu_seqlens.tolist()
    inside_changed = range(bounds[changed], bounds[changed + 1])
    inside_watched = range(bounds[watched], bounds[watched + 1])
    batches = [batch, with_other_text(batch, changed)]
    seen_logits, seen_gradients, moved = set(), set(), False
    for rank_results in run_ranks(logits_and_gradients, world_size, config, batches, watched):
        (places, before, embedded_places, gradient_before), (_, after, _, gradient_after) = rank_results
        for row, place in enumerate(places.tolist()):
            same = torch.equal(before[row], after[row])
            moved |= not same
            assert same or place in inside_changed, f"logits of token {place} changed with document {changed}"
            seen_logits.add(place)
        for row, place in enumerate(embedded_places.tolist()):
            assert torch.equal(gradient_before[row], gradient_after[row]), (
                f"gradient at token {place} changed"
            )
            if place not in inside_watched:
                assert not gradient_before[row].any(), f"the loss of document {watched} reaches token {place}"
            elif place == inside_watched[0]:
                assert gradient_before[row].any(), "the gradient is zero everywhere: the test sees nothing"
            seen_gradients.add(place)
    assert moved, "no logit of the changed document moved: the test sees nothing"
    assert seen_logits == seen_gradients == set(range(batch.tokens_T.numel()))


def test_not_a_number_stays_in_its_document(directory):
    """Attention gives weight 0 to foreign tokens, and 0 x NaN would be NaN: they must not be read at all."""
    from meditron_train.native import packed_attention

    batch = random_batch(5)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(64, heads, 8, generator=generator) for heads in (8, 4, 4))
    clean = packed_attention(q, k, v, batch.cu_seqlens)
    start, end = batch.cu_seqlens[2:4].tolist()
    for tensor in (q, k, v):
        tensor[start:end] = float("nan")
    poisoned = packed_attention(q, k, v, batch.cu_seqlens)
    outside = torch.ones(64, dtype=torch.bool)
    outside[start:end] = False
    assert torch.equal(clean[outside], poisoned[outside])
    assert poisoned[~outside].isnan().all()
