"""FusedAdamW against torch's AdamW in float64, and its place in megatron-core."""

from __future__ import annotations

import copy

import pytest
import torch

from meditron_train.mcore.adam import FusedAdamW


def take_steps(optimizer, params, num_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_torch_adamw(dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (7,))]
    settings = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    expected = [torch.nn.Parameter(x.clone()) for x in start]
    take_steps(torch.optim.AdamW(expected, **settings), expected, 7)
    params = [torch.nn.Parameter(x.clone().to(dtype)) for x in start]
    take_steps(FusedAdamW(params, **settings), params, 7)
    for got, want in zip(params, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_the_step_count_stands_in_the_group_and_survives_a_state_dict():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    optimizer = FusedAdamW(params, lr=0.1)
    take_steps(optimizer, params, 4)
    assert optimizer.param_groups[0]["step"] == 4
    assert "step" not in optimizer.state[params[0]]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = FusedAdamW(copies, lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(optimizer, params, 2, seed=9)
    take_steps(other, copies, 2, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_groups_have_their_own_rate_and_decay():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = FusedAdamW(
        [{"params": [params[0]], "weight_decay": 0.0}, {"params": [params[1]], "lr": 0.0}],
        lr=0.1,
        weight_decay=0.5,
    )
    for param in params:
        param.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(params[0], torch.ones(2)) and torch.equal(params[1], torch.ones(2))


def test_coupled_decay_is_refused():
    with pytest.raises(ValueError, match="adam_w_mode"):
        FusedAdamW([torch.nn.Parameter(torch.ones(1))], adam_w_mode=False)


def test_megatron_builds_on_it():
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    from meditron_train import mcore

    assert mcore.adam is not None and optimizer.Adam is distrib_optimizer.Adam is FusedAdamW
    assert not optimizer.USING_PYTORCH_OPTIMIZER
