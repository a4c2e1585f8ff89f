"""AdamW for megatron-core's optimizers, on CPU and GPU, without apex or Transformer Engine.

megatron-core keeps Adam's `step` in the parameter group, as apex and Transformer Engine do; its checkpoints of
the distributed optimizer rely on that. `torch.optim.AdamW` keeps one `step` tensor per parameter, and its step
counts are wrong after a load. This class has the layout that megatron-core expects and computes with torch's
fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FusedAdamW(torch.optim.Optimizer):
    """Decoupled weight decay Adam (Loshchilov & Hutter 2019, algorithm 2).

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; groups may override them.
        adam_w_mode: megatron-core passes True; decay inside the gradient (plain Adam) is not offered.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError(
                "FusedAdamW decays weights decoupled from the gradient; adam_w_mode must be True"
            )
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; all of a group share one step count."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if not params:
                continue
            for param in params:
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
            # Filled there: copying a number to a GPU would make the host wait for it.
            step_count = torch.full((), float(group["step"]), device=params[0].device)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],  # max_exp_avg_sqs, for amsgrad only
                [step_count.clone() for _ in params],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def install() -> None:
    """Make megatron-core build its optimizers on `FusedAdamW`, whatever else is installed."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = FusedAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    # The code paths for "the step count stands in the parameter group":
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True
