"""How a call to a role of several data-parallel ranks is divided, and its results joined.

A role's method says it once, beside its definition; a method that says nothing is called on every rank with
the same arguments, and rank 0's result counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.reward_model.pairs import Pairs
    from rlhf.types import Batch, Prompt

Method = TypeVar("Method", bound=Callable[..., Any])
Join = Callable[[list[Any]], Any]
# (number of ranks, the call's arguments) -> one dict of arguments for each rank, and how to join their results.
# A generator's results need no joining: what its ranks yield is passed on as it comes.
Divide = Callable[..., tuple[list[dict[str, Any]], Join]]


def over_ranks(divide: Divide) -> Callable[[Method], Method]:
    """Declares how a role's method is divided."""

    def mark(method: Method) -> Method:
        method.divide = divide  # type: ignore[attr-defined]
        return method

    return mark


def balanced(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Items for each rank with near-equal sums of sizes: the largest first, each to the emptiest rank (LPT, Graham
    1969: at most 4/3 of the optimum). Within a rank, items keep their order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], len(shares[r])))
        shares[rank].append(item)
        load[rank] += sizes[item]
    return [sorted(share) for share in shares]


def runs(sizes: Sequence[int], at_most: int) -> Iterator[list[int]]:
    """Items in runs whose sizes add up to at most ``at_most`` (or one item, if that alone is larger)."""
    part: list[int] = []
    total = 0
    for item, size in enumerate(sizes):
        if part and total + size > at_most:
            yield part
            part, total = [], 0
        part.append(item)
        total += size
    if part:
        yield part


def _restored(shares: list[list[int]], results: Sequence[Iterable[Any]]) -> list[Any]:
    """What ranks found for their shares of items, in the items' own order."""
    pairs = zip(shares, results, strict=True)
    found = {item: one for share, part in pairs for item, one in zip(share, part, strict=True)}
    return [found[item] for item in range(len(found))]


def divide_prompts(
    ranks: int, prompts: Sequence[Prompt], params: Any, *, first_sample_id: int
) -> tuple[list[dict[str, Any]], Join]:
    """For ``Policy.generate``: prompts by their lengths; groups keep their numbers, and so their samples' noise."""
    shares = balanced([len(prompt.token_ids) for prompt in prompts], ranks)
    calls = [
        {
            "prompts": [prompts[i] for i in share],
            "params": params,
            "first_sample_id": first_sample_id,
            "groups": share,
        }
        for share in shares
    ]
    return calls, lambda results: results


def divide_batch(ranks: int, batch: Batch) -> tuple[list[dict[str, Any]], Join]:
    """For ``score``: whole groups by their lengths, since samples share their prompt, or sequences where there are
    fewer groups than ranks; the filled batches come back in the batch's own order."""
    groups: dict[int, list[int]] = {}
    for sequence, group in enumerate(batch.groups.tolist()):
        groups.setdefault(group, []).append(sequence)
    units = list(groups.values()) if len(groups) >= ranks else [[i] for i in range(batch.num_sequences)]
    sizes = [sum(batch.lengths[i] for i in unit) for unit in units]
    shares = [sorted(i for unit in share for i in units[unit]) for share in balanced(sizes, ranks)]

    def join(results: list[Batch]) -> Batch:
        filled = [result for result, share in zip(results, shares, strict=True) if share]
        order = [sequence for share in shares for sequence in share]
        back = sorted(range(len(order)), key=order.__getitem__)
        return type(batch).concatenate(filled).select(back)

    return [{"batch": batch.select(share) if share else batch.filler()} for share in shares], join


def divide_minibatch(ranks: int, minibatch: Batch) -> tuple[list[dict[str, Any]], Join]:
    """For ``update``: as :func:`divide_batch`; the ranks agree on the metrics among themselves."""
    calls, _ = divide_batch(ranks, minibatch)
    return [{"minibatch": call["batch"]} for call in calls], lambda results: results[0]


def divide_sequences(ranks: int, token_ids: Sequence[tuple[int, ...]]) -> tuple[list[dict[str, Any]], Join]:
    """For ``RewardModel.judge``: sequences by their lengths; a rank may have none. Scores in the sequences' order."""
    shares = balanced([len(ids) for ids in token_ids], ranks)
    return [{"token_ids": [token_ids[i] for i in share]} for share in shares], lambda found: _restored(shares, found)


def divide_pairs(ranks: int, pairs: Pairs) -> tuple[list[dict[str, Any]], Join]:
    """For ``RewardLearner.score``: whole pairs by their lengths; scores [P, 2] in the pairs' order."""
    shares = balanced(pairs.sizes, ranks)

    def join(found: list[Tensor]) -> Tensor:
        import torch

        return torch.stack(_restored(shares, [part[: len(s)] for s, part in zip(shares, found, strict=True)]))

    return [{"pairs": pairs.select(share) if share else pairs.filler()} for share in shares], join


def divide_update(ranks: int, pairs: Pairs) -> tuple[list[dict[str, Any]], Join]:
    """For ``RewardLearner.update``: as :func:`divide_pairs`; the ranks agree on the metrics among themselves."""
    return divide_pairs(ranks, pairs)[0], lambda results: results[0]
