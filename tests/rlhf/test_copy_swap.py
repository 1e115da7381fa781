"""The copy swap of ZeRO 3: in place, bucket by bucket, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_deepspeed_contract import weights
from test_training_exactness import answer, gap, rollout

from rlhf.roles.policy import Policy
from rlhf.weight_sync import CopySwap, TornSwapError
from rollout_engine.llm import StaleWeightsError


@pytest.fixture
def policy(make_policy: Callable[..., Policy]) -> Policy:
    """ZeRO 3, with buckets so small that there are many."""
    policy = make_policy(zero_stage=3)
    policy.swap = CopySwap(policy.backend, policy.llm, bucket_bytes=40_000)
    assert len(policy.swap.buckets) > 4
    return policy


def engine_weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.llm.model.decoder.named_parameters()}


def test_addresses_stay_and_values_are_the_gathered_weights_over_twenty_swaps(policy: Policy) -> None:
    addresses = policy.llm.parameter_addresses()
    kv = [t.data_ptr() for t in policy.llm.kv_cache.storage()]
    batch = rollout(policy)
    seen = [engine_weights(policy)]
    for version in range(1, 21):
        policy.update(batch)
        swap = policy.publish()
        assert (swap.version, swap.changed, swap.mode) == (version, True, "copy")
        assert policy.llm.parameter_addresses() == addresses
        assert [t.data_ptr() for t in policy.llm.kv_cache.storage()] == kv
        now, truth = engine_weights(policy), weights(policy)
        assert set(now) == set(truth)
        assert all(torch.equal(now[name], truth[name]) for name in truth)
        assert swap.bytes_moved == sum(p.numel() * p.element_size() for p in now.values())
        assert not any(torch.equal(now[name], seen[-1][name]) for name in truth)
        seen.append(now)
    assert gap(policy, rollout(policy)) == 0.0


def test_no_bucket_is_larger_than_its_bound_or_empty(policy: Policy) -> None:
    sizes = {name: p.numel() * p.element_size() for name, p in policy.llm.model.decoder.named_parameters()}
    assert sorted(name for bucket in policy.swap.buckets for name in bucket) == sorted(sizes)
    for bucket in policy.swap.buckets:
        assert bucket and (len(bucket) == 1 or sum(sizes[name] for name in bucket) <= 40_000)


def test_only_one_bucket_is_gathered_at_a_time(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole() -> int:
        """Bytes of the trainer's parameters that this rank holds whole; the others are stand-ins of size 0."""
        return sum(p.numel() * p.element_size() for p in policy.model.decoder.parameters())

    during: list[int] = []
    gathered = policy.backend.gathered

    @contextmanager
    def spy(names: list[str]) -> Any:
        with gathered(names) as found:
            during.append(whole())
            yield found

    policy.update(rollout(policy))
    always = whole()
    monkeypatch.setattr(policy.backend, "gathered", spy)
    policy.publish()
    sizes = [p.numel() * p.element_size() for p in policy.llm.model.decoder.parameters()]
    assert len(during) == len(policy.swap.buckets)
    assert max(during) <= always + max(40_000, *sizes) < sum(sizes)


def test_a_skipped_bucket_is_caught(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every single one, each after an update of its own, so that it is stale; a whole swap repairs it."""
    batch = rollout(policy)
    copy = policy.swap.copy_bucket
    skipped: list[str] = []
    monkeypatch.setattr(policy.swap, "copy_bucket", lambda names, where: {} if names is skipped else copy(names, where))
    for version, skipped in enumerate(policy.swap.buckets):
        policy.update(batch)
        swap = rf"weight swap {version} -> {version + 1}"
        with pytest.raises(TornSwapError, match=swap) as error:
            policy.publish()
        assert all(name in str(error.value) for name in skipped)
        with pytest.raises(StaleWeightsError, match=swap):
            answer(policy)
        skipped = []
        assert policy.publish().version == version + 1


def test_a_skipped_tensor_is_caught(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every single one: its copy does nothing."""
    policy.update(rollout(policy))
    for name, target in policy.llm.model.decoder.named_parameters():
        with monkeypatch.context() as patch:
            patch.setattr(target, "copy_", lambda source: None)
            with pytest.raises(TornSwapError, match=rf"{name} differs from its source".replace(".", r"\.")):
                policy.publish()
    assert policy.publish().version == 1


def test_after_a_torn_swap_generating_raises_until_a_whole_one_lands(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.update(rollout(policy))
    gathered = policy.backend.gathered
    calls = 0

    @contextmanager
    def dying(names: list[str]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        with gathered(names) as found:
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(policy.backend, "gathered", dying)
        with pytest.raises(KeyboardInterrupt):
            policy.publish()
    with pytest.raises(StaleWeightsError, match=r"weight swap 0 -> 1, bucket 3 of \d+ has not landed"):
        answer(policy)
    policy.llm.check_integrity()
    assert policy.publish().version == 1
    assert gap(policy, rollout(policy)) == 0.0


def test_a_publish_without_a_step_moves_nothing(policy: Policy) -> None:
    swap = policy.publish()
    assert (swap.version, swap.changed, swap.bytes_moved) == (0, False, 0)
