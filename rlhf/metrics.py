"""Scalars of a step, by the sections under which W&B groups them."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Sequence

from rlhf.algorithms import Algorithm
from rlhf.types import Batch, Score, Trajectory, WeightUpdate

# Mean |Δ log p| in nats above which fast numerics are under suspicion. NeMo RL's guide has people investigate a mean
# exp|Δ log p| above 1.05, which is about the same.
FAST_GAP = 0.05


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Rewards with their parts (``reward/part/<name>``, so that no name of a user's hides one of ours), and lengths.

    ``reward/unjudged`` is a share; ``reward/errors`` and ``reward/timeouts`` count answers of which
    a component is the penalty.
    """
    scores = [t.score for t in trajectories if t.score is not None]
    values = [score.value for score in scores]
    lengths = [len(t.completion.token_ids) for t in trajectories]
    mean = sum(values) / max(1, len(values))
    metrics = {
        "reward/mean": mean,
        "reward/std": (sum((value - mean) ** 2 for value in values) / max(1, len(values))) ** 0.5,
        "reward/unjudged": (len(trajectories) - len(scores)) / len(trajectories),
        "reward/flat_groups": _flat_groups(trajectories),
        "reward/errors": _problems(trajectories, "error"),
        "reward/timeouts": _problems(trajectories, "timeout"),
        "length/mean": sum(lengths) / len(lengths),
        "length/max": max(lengths),
        "length/truncated": sum(t.truncated for t in trajectories) / len(trajectories),
        "length/answers": len(lengths),
        "length/answer_tokens": sum(lengths),
    }
    greedy = [t.baseline for t in trajectories if t.baseline is not None]
    if greedy:
        metrics["reward/greedy"] = sum(greedy) / len(greedy)
    return {**metrics, **part_means("reward", scores)}


def part_means(section: str, scores: Sequence[Score]) -> dict[str, float]:
    """Means of the parts of scores, as ``section/part/<name>``, each over the scores that have it."""
    means = {}
    for part in sorted({name for score in scores for name in score.parts}):
        values = [score.parts[part] for score in scores if part in score.parts]
        means[f"{section}/part/{part}"] = sum(values) / len(values)
    return means


def _flat_groups(trajectories: Sequence[Trajectory]) -> float:
    """Share of groups whose answers all have the same reward: they teach nothing."""
    rewards: dict[int, set[float | None]] = {}
    for t in trajectories:
        rewards.setdefault(t.group, set()).add(t.score.value if t.score else None)
    return sum(len(values) == 1 for values in rewards.values()) / len(rewards)


def _problems(trajectories: Sequence[Trajectory], kind: str) -> int:
    return sum(t.problem is not None and t.problem.kind == kind for t in trajectories)


def batch_metrics(batch: Batch, algorithm: Algorithm) -> dict[str, float]:
    """What the batch says once its columns are filled, over the trained tokens."""
    trained = batch.loss_mask
    metrics: dict[str, float] = {}
    if batch.ref_logprobs is not None:
        metrics["rollout/kl_coef"] = algorithm.kl_coef
        metrics["rollout/kl"] = algorithm.mean_kl(batch)
    if batch.values is not None:
        returns, values = batch.column("returns")[trained].double(), batch.values[trained].double()
        unexplained = float((returns - values).var() / returns.var().clamp(min=1e-12))
        metrics["critic/explained_variance"] = 1 - unexplained
        metrics["critic/return"] = float(returns.mean())
    return metrics


def merged(metrics: Iterable[dict[str, float]]) -> dict[str, float]:
    """Metrics of several roles as one."""
    return {name: value for one in metrics for name, value in one.items()}


def mean_of(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step with several updates: their means.

    The sampler's gap to the trainer is the first update's: after it the weights are no longer the sampler's.
    """
    means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    return {**means, **{name: value for name, value in updates[0].items() if name.startswith("rollout/logprob_gap")}}


def gap_alarm(step: int, metrics: dict[str, float], exact: bool) -> str | None:
    """What a person has to know of a step whose answers weren't sampled from what is trained; None: they were, or no
    token was trained. exact: of the numerics."""
    if "rollout/logprob_gap_max" not in metrics:  # a critic that warms up alone
        return None
    largest, mean = metrics["rollout/logprob_gap_max"], metrics["rollout/logprob_gap_mean"]
    if exact and not largest <= 0:  # nan is a gap too
        return (
            f"LOG-PROB GAP at step {step}: sampler and trainer differ by up to {largest:.3g} nats a token, and in "
            "exact numerics they must agree to the bit. Look for weights that changed outside the optimizer's step, or "
            "without a publish; for an op, new or changed, whose rows depend on their company (kernels/exactness.py); "
            f"for temperature or truncation that one side alone applies. The answers: rollouts/{step:06d}.jsonl.gz. "
            "Said once a run; every step's gap is rollout/logprob_gap_max"
        )
    if not exact and not mean <= FAST_GAP:
        return (
            f"LOG-PROB GAP at step {step}: sampler and trainer differ by {mean:.3g} nats a token in the mean, and "
            f"rounding makes less than {FAST_GAP}. Look for other weights, dtypes, temperatures or masks on one side; "
            "rollout.numerics=exact, where the model allows it, tells rounding from mistakes, and algorithm.tis_clip=2 "
            "corrects for what can't be helped. Said once a run; every step's gap is rollout/logprob_gap_mean"
        )
    return None


def swap_metrics(swap: WeightUpdate) -> dict[str, float]:
    """The version that generates next, and what the swap moved, per rank."""
    gib = swap.bytes_moved / (1 << 30)
    return {"policy/version": swap.version, "swap/gib": gib, "swap/gib_per_s": gib / max(swap.seconds, 1e-9)}


def timing(times: dict[str, float], started: float, step: int, steps: int, num_tokens: int) -> dict[str, float]:
    """Seconds by phase, of the step without its evaluation, its tokens per second, time left, and driver memory."""
    total = sum(seconds for phase, seconds in times.items() if phase != "evaluate")
    elapsed = time.perf_counter() - started
    return {
        **{f"time/{phase}": seconds for phase, seconds in times.items()},
        "time/step": total,
        "time/elapsed": elapsed,
        "time/eta": elapsed / step * (steps - step),
        "throughput/tokens_per_s": num_tokens / total,
        "memory/driver_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / (1 << 30),
    }
