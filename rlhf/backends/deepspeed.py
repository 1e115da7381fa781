"""DeepSpeed around the decoder: ZeRO 0-3, explicit accumulation boundaries, a norm and a guard of our own.

The contract with DeepSpeed 0.19.8, each point measured there:

* ``gradient_accumulation_steps`` is 1 and the boundary is set by hand around every micro-batch. Without
  it ZeRO 1 and 2 silently drop all but the last one.
* losses are sums with weights fixed beforehand, so ``scale_wrt_gas=False`` and a factor of the world
  size against the averaging over ranks.
* ZeRO 0 in fp32 reports no gradient norm and steps on NaN: we compute the norm and decide before ``step``.
* ZeRO 2 and 3 reduce (and 3 gathers) inside every forward and backward, so all ranks run equally many
  micro-batches; one with fewer fills up with single tokens that train nothing.
* the optimizer is torch's AdamW; one named in the DeepSpeed config would compile an extension.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_local_fp32_param,
    safe_get_local_grad,
)
from torch import Tensor, nn
from torch.distributed import ReduceOp

from kernels.device import collective_backend, default_device
from rlhf.backends.extension_cache import wait_for_locks
from rlhf.config import Train
from rlhf.types import Minibatch

MAX_REDUCE_BUCKET = 500_000_000  # elements
WHOLE_ELEMENTS = 10_000  # ZeRO 3 keeps smaller parameters whole on every rank, between steps too
Data = TypeVar("Data", bound=Minibatch)
LossFn = Callable[[nn.Module, Data], Tensor]


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step. ``grad_norm`` is before clipping, over all ranks; a skipped step moved nothing."""

    loss: float
    grad_norm: float
    skipped: bool


class Ranks:
    """The processes of a role, which meet here. No collective waits longer than ``timeout_s``."""

    def __init__(self, timeout_s: float) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        wait_for_locks()
        # auto_mpi_discovery would go looking for mpi4py; the cluster has set RANK and friends.
        deepspeed.init_distributed(
            collective_backend(), auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s)
        )
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def microbatches(self, batch: Data, max_tokens: int) -> list[Data]:
        """The batch's micro-batches, as many as on the rank that has the most. Collective."""
        found = list(batch.microbatches(max_tokens))
        missing = int(self.reduce([len(found)], "max")[0]) - len(found)
        return found + [batch.filler()] * missing

    def reduce(self, values: Sequence[float], op: Literal["sum", "max"]) -> list[float]:
        """Sums or maxima of each value over the ranks, in float64. Collective."""
        column = torch.tensor(values, dtype=torch.float64, device=default_device())
        if self.world_size > 1:
            torch.distributed.all_reduce(column, {"sum": ReduceOp.SUM, "max": ReduceOp.MAX}[op])
        return column.tolist()


class FrozenBackend(Ranks):
    """A module that doesn't learn, divided among the ranks (ZeRO 3): each gathers a layer's weights when it runs it, so
    that all ranks run it equally often. Give it a module on the CPU: no device ever holds the whole."""

    def __init__(self, module: nn.Module, timeout_s: float) -> None:
        super().__init__(timeout_s)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": WHOLE_ELEMENTS,
                "memory_efficient_linear": False,  # it replaces torch's linear for all of the process
            },
            "bf16": {"enabled": next(module.parameters()).dtype == torch.bfloat16},
            "steps_per_print": 1 << 30,
        }
        deepspeed.zero.Init(module=module, config_dict_or_path=config)  # initialize() would move the whole first
        self.engine = deepspeed.initialize(model=module, config=config)[0]


class DeepSpeedBackend(Ranks):
    """Owns the optimizer and the parameters' storage: ZeRO 1 and 2 move them into flat buffers once, here, and
    ZeRO 3 divides them among the ranks."""

    def __init__(self, module: nn.Module, train: Train, dtype: torch.dtype, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.max_grad_norm = train.max_grad_norm
        # bf16: without ZeRO, DeepSpeed steps through an optimizer made for fp16, which goes astray; and under 1 it adds
        # up the gradients of micro-batches in bf16, or under an optimizer that doesn't skip a step that isn't finite.
        self.stage = train.stage(bf16=dtype == torch.bfloat16)
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
                    "stage": self.stage,
                    "reduce_bucket_size": min(num_parameters, MAX_REDUCE_BUCKET),  # allocated in full by ZeRO 1-3
                    "stage3_param_persistence_threshold": WHOLE_ELEMENTS,
                },
                "bf16": {"enabled": dtype == torch.bfloat16},
                "data_types": {"grad_accum_dtype": "fp32"},
                "timers": {"throughput": {"enabled": False}},  # it waits for the device at every forward
                "steps_per_print": 1 << 30,
            },
        )

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def step(
        self,
        batch: Data,
        max_tokens: int,
        loss_fn: LossFn[Data],
        lr: float,
        before_step: Callable[[], None],
        *,
        first: bool = False,
    ) -> StepResult:
        """One optimizer step over this rank's share of a minibatch, in micro-batches of ``max_tokens`` tokens.

        ``loss_fn(engine, micro)`` gives a loss that sums over micro-batches and ranks. ``before_step`` runs once
        the gradients are known to be finite and the weights are about to change. ``first``: the optimizer has taken no
        step yet; raises RuntimeError naming the weights that this one should have moved, and hasn't. Collective.
        """
        batches = self.microbatches(batch, max_tokens)
        losses = []
        for i, micro in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            loss = loss_fn(self.engine, micro)
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
            losses.append(loss.detach())
        total = self.reduce([sum(torch.stack(losses).tolist())], "sum")[0]
        norm = self._grad_norm()
        if not math.isfinite(norm):
            self._drop_gradients()
            return StepResult(total, norm, skipped=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        watched = self._about_to_move(lr, norm) if first and lr > 0 else {}
        before_step()
        self.engine.step()
        still = [name for name, (index, value) in watched.items() if self._master(name)[index] == value]
        if still:
            raise RuntimeError(
                f"the first optimizer step, at a rate of {lr:g}, left {len(still)} weights where they were although "
                f"they have gradients: {', '.join(still)}. The optimizer that DeepSpeed steps doesn't hold them, or "
                "steps copies of them"
            )
        return StepResult(total, norm, skipped=False)

    def _about_to_move(self, lr: float, norm: float) -> dict[str, tuple[int, Tensor]]:
        """Index and value of the element with the largest gradient, of every master (ZeRO 3: of this rank's share)
        that AdamW's first step, lr g / (|g| + eps), moves there by more than fp32 rounds away."""
        group = self.optimizer.param_groups[0]
        clip = min(1.0, self.max_grad_norm / norm) if norm else 1.0
        found = {}
        for name, p in self.module.named_parameters():
            gradient = self._read_gradient(p).flatten().abs()
            if gradient.numel() == 0:
                continue
            index = int(gradient.argmax())
            g, value = float(gradient[index]) * clip, self._master(name)[index].clone()
            if lr * g / (g + group["eps"]) > abs(float(value)) * 2**-23:
                found[name] = (index, value)
        return found

    def _master(self, name: str) -> Tensor:
        """The fp32 weights that the optimizer steps, flat; under ZeRO 3 this rank's share. Collective under 1 and 2."""
        p = self.module.get_parameter(name)
        if self.stage == 3:
            return safe_get_local_fp32_param(p).detach().flatten()
        master = safe_get_full_fp32_param(p)  # None: the parameter itself
        return (p if master is None else master).detach().flatten()

    def _read_gradient(self, p: nn.Parameter) -> Tensor:
        """Before the step; under ZeRO 3 this rank's share. Collective under 1 and 2."""
        gradient: Tensor = safe_get_local_grad(p) if self.stage == 3 else safe_get_full_grad(p)
        return gradient

    def _grad_norm(self) -> float:
        """Of all parameters, the same on every rank."""
        if self.stage in (1, 2):
            return float(self.optimizer.scaled_global_norm())
        squares = [self._read_gradient(p).double().square().sum() for p in self.module.parameters()]
        square = sum(torch.stack(squares).tolist())
        return math.sqrt(self.reduce([square], "sum")[0] if self.stage == 3 else square)

    def _drop_gradients(self) -> None:
        if self.stage > 0:
            self.engine.step()  # ZeRO sees the overflow itself, skips, and clears its partitioned gradients
        else:
            self.engine.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Full gradients by parameter name between backward and step; for tests and diagnostics. Collective."""
        return {name: safe_get_full_grad(p).clone() for name, p in self.module.named_parameters()}

    def buckets(self, max_bytes: int) -> list[list[str]]:
        """Parameter names in runs of at most ``max_bytes`` (or one parameter, if that alone is larger)."""
        found: list[list[str]] = []
        room = 0
        for name, p in self.module.named_parameters():
            # Under ZeRO 3 numel() is that of an empty stand-in.
            size = getattr(p, "ds_numel", p.numel()) * p.element_size()
            if size > room:
                found.append([])
                room = max_bytes
            found[-1].append(name)
            room -= size
        return found

    def save_state(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write weights, fp32 masters and optimizer, each rank its own share, and a few plain values. Collective."""
        self.engine.save_checkpoint(str(folder), tag="state", client_state=extra, save_latest=False)

    def load_state(self, folder: Path) -> dict[str, Any]:
        """Take over what :meth:`save_state` of as many ranks wrote, in place; the plain values. Collective.

        Call it before the first step: under ZeRO 3, DeepSpeed loads into a fresh engine only.
        """
        path, extra = self.engine.load_checkpoint(str(folder), tag="state")
        if path is None:
            raise ValueError(f"{folder} holds no DeepSpeed checkpoint; remove its DONE to fall back to an older one")
        return extra

    @contextmanager
    def gathered(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Whole parameters by name, read-only and only inside the ``with``. Collective under ZeRO 3."""
        parameters = {name: self.module.get_parameter(name) for name in names}
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=self.stage == 3):
            yield {name: p.detach() for name, p in parameters.items()}


def prebuild_ops() -> None:
    """Build what DeepSpeed would build inside the first run: on a CPU, its shared-memory collective."""
    from deepspeed.accelerator import get_accelerator

    if collective_backend() == "gloo":
        wait_for_locks()
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()
