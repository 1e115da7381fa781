"""Random heads to score tokens with, and what is true of them: formulas in float64, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from accuracy import normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.triton.logits import Form, form_of

HEATS = (0.0, 0.3, 1.0, 2.0)
SOFTCAPS = [None, 3.0]  # logits reach 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_rows(
    rows: int, width: int, vocabulary: int, num_tokens: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets, temperature. The first targets lie at the borders of tiles and of the vocabulary."""
    hidden = normal(rows, width, seed=rows, dtype=dtype, device=device)
    weight = normal(vocabulary, width, seed=vocabulary) * (6 / width) ** 0.5
    targets = torch.randint(num_tokens, (rows,), generator=torch.Generator().manual_seed(width))
    edges = torch.tensor([0, num_tokens - 1, *(i for i in (127, 128, 255, 256, 511, 512) if i < num_tokens)])[:rows]
    targets[: len(edges)] = edges
    heat = torch.tensor(HEATS).repeat(rows)[:rows]
    return hidden, weight.to(device, dtype), targets.to(device), heat.to(device)


def true_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    z = hidden.double() @ weight.double().T
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def true_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, heat: Tensor, num_tokens: int, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The rows of the head beyond the tokenizer do not exist."""
    z = true_logits(hidden, weight[:num_tokens], softcap) / torch.where(heat > 0, heat, 1.0).double()[:, None]
    logp = torch.log_softmax(z, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def forms(weight: Tensor) -> dict[str, Form]:
    """The shipped form, and the other one: a forward by chunks of logits, and the backward that isn't shipped."""
    shipped = form_of(weight)
    return {
        "shipped": shipped,
        "other": shipped._replace(fused_forward=False, fused_backward=not shipped.fused_backward),
    }


class LargestNew(TorchDispatchMode):
    """Counts the elements of the largest float tensor that a torch operation makes in memory not of ``known``."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.is_floating_point() and t.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, t.numel())
        return out
