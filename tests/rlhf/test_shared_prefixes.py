"""What the samples of a prompt repeat is forwarded once, and nothing can be told from the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.packing import SharedPrefixes, forward_logprobs
from rlhf.types import Batch
from rollout_engine.models.checkpoint import load_model
from rollout_engine.models.context import PackedAttention
from rollout_engine.models.decoder import Decoder


@pytest.fixture(scope="module")
def decoder(odd_checkpoint: Path) -> Decoder:
    return load_model(odd_checkpoint, tokenizer=False).decoder


def make(sequences: list[list[int]], groups: list[int], num_prompt: int) -> Batch:
    lengths = [len(s) for s in sequences]
    total = sum(lengths)
    return Batch(
        tokens=torch.tensor([token for s in sequences for token in s]),
        lengths=tuple(lengths),
        loss_mask=torch.cat([torch.arange(n) >= num_prompt for n in lengths]),
        temperature=torch.full((total,), 0.8),
        rollout_logprobs=torch.zeros(total),
        groups=torch.tensor(groups),
        rewards=torch.zeros(len(lengths)),
    )


def alone(decoder: Decoder, batch: Batch) -> torch.Tensor:
    """Log-probs of the trained tokens, every sequence whole and by itself."""
    found = []
    for ids, mask in zip(batch.tokens.split(batch.lengths), batch.loss_mask.split(batch.lengths), strict=True):
        hidden = decoder.hidden(ids, PackedAttention.from_lengths([len(ids)]))
        (scored,) = mask.nonzero(as_tuple=True)
        found.append(decoder.head(hidden[scored - 1], ids[scored], torch.full((len(scored),), 0.8))[0])
    return torch.cat(found)


def test_what_is_left_out_by_hand() -> None:
    prompt = [7, 8, 9]
    batch = make([[*prompt, 1, 2], [*prompt, 1, 3, 4], [*prompt, 1, 2], [*prompt, 5]], [0, 0, 0, 1], 3)
    shared = SharedPrefixes.of(batch)
    # 7 8 9 1 of the first; of the second only 3; the third repeats the first; another group shares nothing.
    assert shared.tokens.tolist() == [7, 8, 9, 1, 3, 7, 8, 9]
    assert (shared.lengths, shared.num_own) == ([4, 5, 3], [4, 1, 3])
    assert shared.source.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert shared.row_of[batch.loss_mask.nonzero()[:, 0] - 1].tolist() == [2, 3, 2, 3, 4, 2, 3, 7]


groups_of_answers = st.lists(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=40), min_size=1, max_size=4), min_size=1, max_size=3
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups_of_answers, st.integers(1, 40))
def test_log_probs_are_bitwise_those_of_each_sequence_alone(
    decoder: Decoder, answers: list[list[list[int]]], num_prompt: int
) -> None:
    sequences = [[*range(20 + g, 20 + g + num_prompt), *a] for g, group in enumerate(answers) for a in group]
    batch = make(sequences, [g for g, group in enumerate(answers) for _ in group], num_prompt)
    with torch.no_grad():
        scored, logprobs, _ = forward_logprobs(decoder, batch)
        assert torch.equal(logprobs, alone(decoder, batch))
    assert scored.tolist() == batch.loss_mask.nonzero()[:, 0].tolist()
    assert len(SharedPrefixes.of(batch).tokens) <= batch.num_tokens


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_without_sharing(decoder: Decoder, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PackedAttention.from_lengths
    monkeypatch.setattr(PackedAttention, "from_lengths", lambda *a, **k: plain(*a, **{**k, "fused": fused}))
    prompt = list(range(10, 50))
    batch = make([[*prompt, *range(60, 60 + n)] for n in (5, 33, 1)] + [[*prompt, 99, 98]] * 2, [4] * 5, 40)
    weights = torch.linspace(-1, 1, int(batch.loss_mask.sum()))
    grads = []
    for score in (lambda: forward_logprobs(decoder, batch)[1], lambda: alone(decoder, batch)):
        decoder.zero_grad()
        (score() * weights).sum().backward()
        grads.append([p.grad.clone() for p in decoder.parameters()])
    assert all((a - b).norm() <= 2e-5 * b.norm() for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_have_the_same_bits_every_time(
    decoder: Decoder, fused: bool, monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    """Many answers to a prompt, whose gradients two threads add up at its rows."""
    set_threads(2)
    plain = PackedAttention.from_lengths
    monkeypatch.setattr(PackedAttention, "from_lengths", lambda *a, **k: plain(*a, **{**k, "fused": fused}))
    batch = make([[*range(10, 80), *range(60, 63 + n)] for n in range(40)] * 2, [0] * 80, 70)
    shared = SharedPrefixes.of(batch)
    assert len(shared.source) * 32 > 2 * 32768 > len(shared.tokens)  # torch divides work of 32768 numbers and more
    grads = []
    for _ in range(10):
        decoder.zero_grad()
        forward_logprobs(decoder, batch)[1].square().sum().backward()
        grads.append([p.grad.clone() for p in decoder.parameters()])
    assert all(torch.equal(a, b) for again in grads[1:] for a, b in zip(grads[0], again, strict=True))
