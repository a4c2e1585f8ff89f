"""The norm of all gradients is bit for bit the one of megatron-core's fallback."""

from __future__ import annotations

import torch

from meditron_train.mcore import grad_norm


def test_megatron_core_uses_it():
    from megatron.core.optimizer import clip_grads

    assert clip_grads.l2_norm_impl is grad_norm.l2_norm


def test_the_bits_are_those_of_the_fallback():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 300):
        gradients = [
            torch.randn(int(n), generator=generator) * 10.0**exponent
            for n, exponent in zip(
                torch.randint(1, 3000, (count,), generator=generator),
                torch.randint(-6, 3, (count,), generator=generator),
                strict=True,
            )
        ]
        norms = torch.tensor([[torch.norm(gradient) for gradient in gradients]])
        ours, _ = grad_norm.l2_norm(65536, None, [gradients], False)
        assert ours.shape == (1,)
        assert torch.equal(ours, torch.norm(norms).reshape(1))


def test_it_agrees_with_float64():
    gradients = [torch.arange(1.0, 100), torch.full((50,), -3.0)]
    ours, _ = grad_norm.l2_norm(65536, None, [gradients], False)
    assert float(ours) == torch.cat(gradients).double().norm().float()
