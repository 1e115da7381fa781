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


def discounted_sums_to_go(values: Tensor, lengths: tuple[int, ...], discount: float) -> Tensor:
    """Each token's value plus ``discount`` times its successor's sum, within its sequence: [T] -> [T].

    A reverse scan by doubling: after k rounds a sum reaches 2^k tokens ahead, so log2(longest) rounds over all
    sequences at once (Hillis and Steele 1986). ``discount`` in [0, 1].
    """
    ahead = torch.cat([torch.arange(n, 0, -1) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.int64)
    result, reach, factor = values.clone(), 1, discount
    while reach < max(lengths, default=0):
        shifted = torch.zeros_like(result)
        shifted[:-reach] = result[reach:]
        result = result + factor * torch.where(ahead > reach, shifted, 0)
        reach, factor = 2 * reach, factor * factor
    return result


def gae(rewards: Tensor, values: Tensor, lengths: tuple[int, ...], gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al. 2015, arXiv 1506.02438, eq. 16), and the returns they imply.

    rewards and values [N] of every decision, sequences of ``lengths`` decisions end to end; ``values[t]`` is of the
    state before decision t, and after a sequence's last one it is 0. delta_t = r_t + gamma V_{t+1} - V_t, A_t is the
    sum over l of (gamma lam)^l delta_{t+l}. Returns (advantages [N], A + V [N]).
    """
    following = torch.cat([torch.cat((part[1:], part.new_zeros(min(1, len(part))))) for part in values.split(lengths)])
    advantages = discounted_sums_to_go(rewards + gamma * following - values, lengths, gamma * lam)
    return advantages, advantages + values


def whitened(values: Tensor, of: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Values [N] less the mean of ``of``, over its standard deviation (n - 1, as ``torch.std``).

    ``of`` [M]: the values themselves by default; of a single one, all 0.
    """
    known = (values if of is None else of).double()
    mean = known.mean()
    deviation = ((known - mean).square().sum() / max(1, len(known) - 1)).sqrt()
    return ((values.double() - mean) / (deviation + eps)).to(values.dtype)


def overlong_penalty(length: int, max_tokens: int, buffer: float) -> float:
    """DAPO's soft punishment of an answer's length (Yu et al. 2025, arXiv 2503.14476, eq. 13), in [0, 1].

    0 up to ``max_tokens - buffer`` tokens, then rising evenly to 1 at ``max_tokens``.
    """
    return min(1.0, max(0.0, (length - (max_tokens - buffer)) / buffer))


KL_COEF_STEP = 1.1  # what a rollout changes the coefficient by
KL_COEF_MIN, KL_COEF_MAX = 1e-4, 10.0  # from where a long stay on one side of the target is soon made good


def adapted_kl_coef(coef: float, kl: float, target: float) -> float:
    """PPO's adaptive penalty (Schulman et al. 2017, sec. 4), in small steps: 1.1 times as much above 1.5 x target,
    1.1 times less below target / 1.5, and held within [1e-4, 10].

    The paper doubles and halves, after updates that bring the KL to where the coefficient lets it. A rollout's few
    updates don't: the KL follows over tens of steps, and a coefficient that doubles at each overshoots by orders of
    magnitude before it does.
    """
    if kl > 1.5 * target:
        return min(KL_COEF_STEP * coef, KL_COEF_MAX)
    return max(coef / KL_COEF_STEP, KL_COEF_MIN) if kl < target / 1.5 else coef


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


def importance_ratio(target: Tensor, behaviour: Tensor, counts: tuple[int, ...], unit: str) -> Tensor:
    """Probability under the ``target`` log-probs over that under those of the sampler: [R] -> [R], detached.

    ``unit``: of each ``token``; of the whole ``sequence``, the product over its tokens, which is the exact weight and
    the one of larger variance; or ``geometric``, that product's root, a token's share of it. ``counts``: how many of
    the R tokens each sequence has, in order.
    """
    log_ratio = (target - behaviour).detach()
    if unit == "sequence":
        log_ratio = torch.cat([part.sum().expand(len(part)) for part in log_ratio.split(counts)])
    elif unit == "geometric":
        log_ratio = torch.cat([part.mean().expand(len(part)) for part in log_ratio.split(counts)])
    else:
        assert unit == "token", unit
    return torch.exp(log_ratio.clamp(-20, 20))


def truncated_importance(
    target: Tensor, behaviour: Tensor, counts: tuple[int, ...], unit: str, clip: float
) -> tuple[Tensor, Tensor]:
    """Weight min(importance ratio, clip) of each token's policy loss, where trainer and sampler differ.

    [R], detached; arguments as :func:`importance_ratio` (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training"). Returns (weight [R], truncated [R] bool).
    """
    ratio = importance_ratio(target, behaviour, counts, unit)
    return ratio.clamp(max=clip), ratio > clip


def rejection_mask(
    target: Tensor, behaviour: Tensor, counts: tuple[int, ...], unit: str, low: float, high: float
) -> Tensor:
    """Which tokens to keep, [R] bool: those whose importance ratio is within [low, high].

    Arguments as :func:`importance_ratio`. A mask beside the weights, not in them: Liu et al. 2025, "When Speed Kills
    Stability" (``sequence``, ``geometric``); IcePop (Ring-1T, arXiv 2510.18855, ``token``).
    """
    ratio = importance_ratio(target, behaviour, counts, unit)
    return (ratio >= low) & (ratio <= high)


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


# ---------------------------------------------------------------- value loss


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic, at least that of its value held within ``clip`` of the old one.

    All [R]. PPO2's form (Engstrom et al. 2020, arXiv 2005.12729, sec. 2). Returns (loss [R], clipped [R] bool: the
    clip took the gradient away).
    """
    error = (values - returns).square()
    if clip is None:
        return error / 2, torch.zeros_like(values, dtype=torch.bool)
    held = old_values + (values - old_values).clamp(-clip, clip)
    held_error = (held - returns).square()
    return torch.maximum(error, held_error) / 2, held_error > error


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


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, center_coef: float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin): a preference under Bradley and Terry (1952), with the margin of
    Llama 2 (arXiv 2307.09288, eq. 2). All [P].

    ``center_coef`` x (chosen + rejected)^2 is added (Eisenstein et al. 2023, arXiv 2312.09244, sec. 2): preferences
    leave every prompt's scores an offset of their own, and without it scores compare across prompts.
    """
    preference = torch.nn.functional.softplus(margin - (chosen - rejected))
    return preference + center_coef * (chosen + rejected).square()
