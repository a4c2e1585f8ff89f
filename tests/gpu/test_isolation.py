"""Documents packed into one sample do not see each other on a GPU either: to the bit, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import run_ranks
from tests.gpu.devices import CPU, CUDA, HEAD_DIM, needs_gpus, num_not_finite, our_attention
from tests.gpu.ranks import logits_and_gradients
from tests.train.ranks import make_config
from tests.train.reference import hf_model, random_batch
from tests.train.test_isolation import LAYOUTS, with_other_text

CHANGED, WATCHED = 1, 3
PLACES = [
    pytest.param("cpu", "tp1", id="cpu-tp1", marks=CPU.marks),
    *(
        pytest.param("cuda", name, id=f"cuda-{name}", marks=needs_gpus(world_size))
        for name, (world_size, _) in LAYOUTS.items()
    ),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("isolation") / "hf"
    hf_model().save_pretrained(path)
    return path


def places_of(batch, document: int) -> set[int]:
    return set(range(*batch.cu_seqlens[document : document + 2].tolist()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device, layout", PLACES)
def test_a_document_changes_nothing_in_another(device, layout, precision, directory):
    assert_isolated(device, layout, {"precision": precision}, directory)


@pytest.mark.parametrize("device, layout", PLACES)
def test_a_document_changes_nothing_in_another_with_our_attention(device, layout, tmp_path):
    """With heads that our kernels take on a GPU, too."""
    train = our_attention(device)
    hf_model(head_dim=HEAD_DIM).save_pretrained(tmp_path / "hf")
    assert_isolated(device, layout, train, tmp_path / "hf")


def assert_isolated(device, layout, train, directory):
    world_size, parallel = LAYOUTS[layout]
    config = make_config(directory, {"parallel": parallel, "train": train})
    batch = random_batch(3)
    batches = [batch, with_other_text(batch, CHANGED)]
    moved, seen_logits, reached, seen_gradients = set(), set(), set(), set()
    for before, after in run_ranks(logits_and_gradients, world_size, device, config, batches, WATCHED):
        places, logits, embedded_places, gradient = before
        assert num_not_finite({"logits": logits, "gradient": gradient}) == {}
        assert torch.equal(gradient, after[3]), "gradients changed with the text of another document"
        moved |= set(places[(logits != after[1]).any(dim=1)].tolist())
        reached |= set(embedded_places[gradient.any(dim=1)].tolist())
        seen_logits |= set(places.tolist())
        seen_gradients |= set(embedded_places.tolist())
    assert seen_logits == seen_gradients == set(range(batch.tokens_T.numel()))
    # Not empty, or the test would see nothing.
    assert moved == places_of(batch, CHANGED), "logits moved elsewhere than in the changed document"
    assert reached == places_of(batch, WATCHED), "the loss of a document reaches other tokens than its own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_not_a_number_stays_in_its_document(device, dtype):
    """Attention gives weight 0 to foreign tokens, and 0 x NaN would be NaN: they must not be read at all."""
    from meditron_train.native import packed_attention

    bounds = [0, 5, 70, 300, 512]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(512, heads, 64, generator=generator).to(device, dtype) for heads in (8, 4, 4))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    clean = packed_attention(q, k, v, cu_seqlens)
    start, end = bounds[2:4]
    for tensor in (q, k, v):
        tensor[start:end] = float("nan")
    poisoned = packed_attention(q, k, v, cu_seqlens)
    assert int(clean.isnan().sum()) == 0
    assert int(poisoned.isnan().sum()) == (end - start) * 8 * 64
    assert torch.equal(clean[:start], poisoned[:start]) and torch.equal(clean[end:], poisoned[end:])
