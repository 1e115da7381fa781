"""The mathematics of policy optimisation as pure functions of tensors. R scored tokens, S sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, groups: Tensor, *, normalize_std: bool, eps: float = 1e-6) -> Tensor:
    """Reward minus the mean of its group, over the group's standard deviation (GRPO, Shao et al. 2024, eq. 3).

    rewards [S], groups [S] int64 ids -> [S]. The deviation is the sample one (n - 1). A group of one, or
    with equal rewards, gets exactly 0: the mean is taken in float64, or its rounding would be divided by eps.
    """
    given, rewards = rewards.dtype, rewards.double()
    _, index = torch.unique(groups, return_inverse=True)
    count = torch.bincount(index).to(rewards.dtype)
    mean = torch.zeros_like(count).index_add_(0, index, rewards) / count
    centred = rewards - mean[index]
    if not normalize_std:
        return centred.to(given)
    variance = torch.zeros_like(count).index_add_(0, index, centred * centred) / (count - 1).clamp(min=1)
    return (centred / (torch.sqrt(variance[index]) + eps)).to(given)


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective as a loss (Schulman et al. 2017, eq. 7), with DAPO's separate bounds.

    All [R]; the log-ratio is held within 20. Returns (loss [R], clipped [R] bool: the clip took the gradient away).
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(-20, 20))
    free = ratio * advantages
    bound = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(free, bound), bound < free


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) from the policy's samples: r - 1 - log r, r = ref / policy.

    [R]; never negative, unbiased, low variance (joschu.net/blog/kl-approx.html). The log-ratio is held within 20.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
    return torch.expm1(log_ratio) - log_ratio  # exp(x) - 1 would cancel where the policies are close


def token_weights(loss_mask: Tensor, lengths: tuple[int, ...], aggregation: str, max_tokens: int) -> Tensor:
    """Weight of every token in the loss of one optimizer step, [T] fp32, 0 where ``loss_mask`` is False.

    ``token_mean``: 1/N over the N trained tokens (DAPO). ``sequence_mean``: 1/(S * len) over the S sequences
    that train (GRPO). ``constant_length``: 1/(S * max_tokens) (Dr. GRPO). Decided once for the whole
    minibatch, so that any split into micro-batches and ranks just sums.
    """
    trained = loss_mask.float()
    per_sequence = torch.stack([part.sum() for part in trained.split(lengths)])
    sequences = (per_sequence > 0).sum().clamp(min=1)
    if aggregation == "token_mean":
        return trained / trained.sum().clamp(min=1)
    if aggregation == "constant_length":
        return trained / (sequences * max_tokens)
    assert aggregation == "sequence_mean", aggregation
    return trained / (sequences * per_sequence.clamp(min=1)).repeat_interleave(torch.tensor(lengths))
