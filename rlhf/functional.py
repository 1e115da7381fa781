"""The mathematics of policy optimisation as pure functions of tensors.

R scored tokens, S sequences, T tokens of all sequences laid end to end, N values that are compared. A log-ratio is
held within 20 wherever it meets an exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ---------------------------------------------------------------- returns and advantages


def relative_advantages(
    returns: Tensor, groups: Tensor, *, baseline: str, std: str, leave_one_out: bool = False, eps: float = 1e-6
) -> Tensor:
    """Returns minus their mean, over their standard deviation; each ``group``, ``batch`` or ``none`` says over which.

    returns [N], groups [N] int64 ids -> [N]. Group and group is GRPO (Shao et al. 2024, sec. 4.1.2). The deviation
    is the sample one (n - 1), of what the baseline leaves, as in REINFORCE++ with baseline (Hu et al. 2025); so it
    may not be taken over fewer values than the mean. ``leave_one_out`` takes the mean of the *other* values, which
    is a factor n / (n - 1) (RLOO, Ahmadian et al. 2024). A value without mates, or among
    equal ones, gets exactly 0: the mean is taken in float64, or its rounding would be divided by eps.
    """
    if baseline == "none":
        assert std == "none"
        return returns
    index, count = _levels(groups, baseline)
    wide = returns.double()
    centred = wide - (torch.zeros_like(count).index_add_(0, index, wide) / count)[index]
    result = centred
    if std != "none":
        over, size = _levels(groups, std)
        variance = torch.zeros_like(size).index_add_(0, over, centred * centred) / (size - 1).clamp(min=1)
        result = result / (torch.sqrt(variance) + eps)[over]
    if leave_one_out:
        result = result * (count / (count - 1).clamp(min=1))[index]
    return result.to(returns.dtype)


def _levels(groups: Tensor, level: str) -> tuple[Tensor, Tensor]:
    """(index of each value's group [N], sizes of the groups, float64); at level ``batch`` all are one group."""
    ids = groups if level == "group" else torch.zeros_like(groups)
    _, index = torch.unique(ids, return_inverse=True)
    return index, torch.bincount(index).double()


def sequence_sums(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Sum of every sequence's values: [T] -> [S]."""
    return torch.stack([part.sum() for part in values.split(lengths)])


def sums_to_go(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Sum of the values from each token to the end of its sequence: [T] -> [T]."""
    return torch.cat([part.flip(0).cumsum(0).flip(0) for part in values.split(lengths)])


# ---------------------------------------------------------------- policy losses


def token_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Probability under the policy over that under the old one, token by token: [R] -> [R]."""
    return torch.exp((logprobs - old_logprobs).clamp(-20, 20))


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Geometric mean of the token ratios of a sequence, at each of its tokens.

    GSPO-token (Zheng et al. 2025, arXiv 2507.18071, eq. 14). [R] -> [R]; ``counts``: how many of the R tokens each
    sequence has, in order. The value s is the sequence's, the gradient by a token's log-prob is s, so that a mean
    over the sequence's tokens has the gradient of s itself.
    """
    log_ratio = logprobs - old_logprobs
    means = torch.cat([part.mean().expand(len(part)) for part in log_ratio.detach().split(counts)])
    return torch.exp(means.clamp(-20, 20) + (logprobs - logprobs.detach()))


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective as a loss (Schulman et al. 2017, eq. 7), with DAPO's separate bounds.

    All [R]. ``dual_clip`` c > 1 bounds the loss of a bad token by c |advantage| (Ye et al. 2020, arXiv 1912.09729),
    however likely it has become. Returns (loss [R], clipped [R] bool: a clip took the gradient away).
    """
    free = ratio * advantages
    objective = torch.minimum(free, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective, objective != free


def clipped_weight_loss(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """CISPO: REINFORCE whose importance weight is clipped and detached (MiniMax-M1 2025, arXiv 2506.13585, eq. 4-5).

    All [R]. No token loses its gradient; ``clip_low`` = 1 sets no lower bound. Returns (loss [R], clipped [R] bool:
    the weight is at a bound).
    """
    ratio = ratio.detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages * logprobs, weight != ratio


def truncated_importance(old_logprobs: Tensor, rollout_logprobs: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Weight min(trainer / sampler, clip) of each token's policy loss, where the two compute different probabilities.

    [R], detached (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    Returns (weight [R], truncated [R] bool).
    """
    ratio = token_ratio(old_logprobs.detach(), rollout_logprobs)
    return ratio.clamp(max=clip), ratio > clip


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Schulman's estimates of KL(policy || reference) from the policy's samples, with r = reference / policy.

    [R]. k1 = -log r is unbiased and may be negative; k2 = (log r)^2 / 2 is biased, but its gradient is that of the
    KL; k3 = r - 1 - log r is unbiased and never negative, its gradient is not the KL's (joschu.net/blog/kl-approx.html;
    Tang and Munos 2025, arXiv 2506.09477). The log-ratio is held within 20.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio * log_ratio / 2
    assert estimator == "k3", estimator
    return torch.expm1(log_ratio) - log_ratio  # exp(x) - 1 would cancel where the policies are close


# ---------------------------------------------------------------- loss weights


def token_weights(loss_mask: Tensor, lengths: tuple[int, ...], aggregation: str, max_tokens: int) -> Tensor:
    """Weight of every token in the loss of one optimizer step, [T] fp32, 0 where ``loss_mask`` is False.

    ``token_mean``: 1/N over the N trained tokens (DAPO). ``sequence_mean``: 1/(S * len) over the S sequences
    that train (GRPO). ``constant_length``: 1/(S * max_tokens) (Dr. GRPO). Decided once for the whole
    minibatch, so that any split into micro-batches and ranks just sums.
    """
    trained = loss_mask.float()
    per_sequence = sequence_sums(trained, lengths)
    sequences = (per_sequence > 0).sum().clamp(min=1)
    if aggregation == "token_mean":
        return trained / trained.sum().clamp(min=1)
    if aggregation == "constant_length":
        return trained / (sequences * max_tokens)
    assert aggregation == "sequence_mean", aggregation
    return trained / (sequences * per_sequence.clamp(min=1)).repeat_interleave(torch.tensor(lengths))
