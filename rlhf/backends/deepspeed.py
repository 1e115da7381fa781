"""DeepSpeed around the decoder: ZeRO 0-2, explicit accumulation boundaries, a norm and a guard of our own.

The contract with DeepSpeed 0.19.8, each point measured there:

* ``gradient_accumulation_steps`` is 1 and the boundary is set by hand around every micro-batch. Without
  it ZeRO 1 and 2 silently drop all but the last one.
* losses are sums with weights fixed beforehand, so ``scale_wrt_gas=False`` and a factor of the world
  size against the averaging over ranks.
* ZeRO 0 in fp32 reports no gradient norm and steps on NaN: we compute the norm and decide before ``step``.
* the optimizer is torch's AdamW; one named in the DeepSpeed config would compile an extension.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from kernels.device import collective_backend, default_device
from rlhf.backends.extension_cache import wait_for_locks
from rlhf.config import Train
from rlhf.types import Batch

LossFn = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step. ``grad_norm`` is before clipping, over all ranks; a skipped step moved nothing."""

    loss: float
    grad_norm: float
    skipped: bool


class DeepSpeedBackend:
    """Owns the optimizer and the parameters' storage (ZeRO 1 and 2 move them into flat buffers once, here)."""

    def __init__(self, module: nn.Module, train: Train, dtype: torch.dtype) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        wait_for_locks()
        # auto_mpi_discovery would go looking for mpi4py; the cluster has set RANK and friends.
        deepspeed.init_distributed(collective_backend(), auto_mpi_discovery=False, verbose=False)
        self.stage = train.zero_stage
        matrices = [p for p in module.parameters() if p.ndim > 1]
        vectors = [p for p in module.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": train.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=train.lr,
            betas=train.betas,
            fused=default_device().type == "cuda",
        )
        num_parameters = sum(p.numel() for p in module.parameters())
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": train.max_grad_norm,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": train.zero_stage,
                    "reduce_bucket_size": min(num_parameters, 500_000_000),  # allocated in full by ZeRO 1 and 2
                },
                "bf16": {"enabled": dtype == torch.bfloat16},
                "steps_per_print": 1 << 30,
            },
        )
        self.world_size = torch.distributed.get_world_size()

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def step(
        self, microbatches: Iterable[Batch], loss_fn: LossFn, lr: float, before_step: Callable[[], None]
    ) -> StepResult:
        """One optimizer step over all micro-batches.

        ``loss_fn(engine, micro)`` gives a loss that sums over micro-batches. ``before_step`` runs once the
        gradients are known to be finite and the weights are about to change.
        """
        batches = list(microbatches)
        total = 0.0
        for i, micro in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            loss = loss_fn(self.engine, micro)
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
            total += loss.item()
        norm = self._grad_norm()
        if not math.isfinite(norm):
            self._drop_gradients()
            return StepResult(total, norm, skipped=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before_step()
        self.engine.step()
        return StepResult(total, norm, skipped=False)

    def _grad_norm(self) -> float:
        if self.stage > 0:
            return float(self.optimizer.scaled_global_norm())
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads])))

    def _drop_gradients(self) -> None:
        if self.stage > 0:
            self.engine.step()  # ZeRO sees the overflow itself, skips, and clears its partitioned gradients
        else:
            self.engine.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Full gradients by parameter name between backward and step; for tests and diagnostics."""
        from deepspeed.utils import safe_get_full_grad

        found: dict[str, Any] = {name: safe_get_full_grad(p) for name, p in self.module.named_parameters()}
        return {name: grad.clone() for name, grad in found.items() if grad is not None}


def prebuild_ops() -> None:
    """Build what DeepSpeed would build inside the first run: on a CPU, its shared-memory collective."""
    from deepspeed.accelerator import get_accelerator

    if collective_backend() == "gloo":
        wait_for_locks()
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()
