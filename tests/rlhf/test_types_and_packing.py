"""Trajectories, the packed batch and its splits, and log-probs of packed sequences against transformers."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlhf.packing import forward_logprobs, pack, pack_supervised, score_tokens
from rlhf.types import Batch, Completion, Prompt, Score, Trajectory
from rollout_engine.models.checkpoint import load_model
from rollout_engine.models.decoder import Decoder

VOCAB = 131
PER_SEQUENCE = ("groups", "rewards", "baselines")


def trajectory(
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    *,
    group: int = 0,
    score: float | None = 1.0,
    reason: str = "stop",
    temperature: float = 1.0,
) -> Trajectory:
    logprobs = tuple(-0.5 * (i + 1) for i in range(len(answer)))
    completion = Completion("p", "a", answer, reason, logprobs, temperature=temperature)
    given = Prompt(3, "p", prompt)
    return Trajectory.from_completion(given, completion, group, None if score is None else Score(score))


# ---------------------------------------------------------------- trajectories and pack


def test_a_trajectory_aligns_mask_and_logprobs_to_the_answer() -> None:
    made = trajectory((5, 6, 7), (8, 9), group=4, reason="length")
    assert made.token_ids == (5, 6, 7, 8, 9)
    assert made.loss_mask == (False, False, False, True, True)
    assert made.logprobs == (0.0, 0.0, 0.0, -0.5, -1.0)
    assert (made.group, made.score, made.truncated) == (4, Score(1.0), True)
    assert not trajectory((5,), (8,)).truncated


def test_pack_lays_judged_trajectories_end_to_end() -> None:
    batch = pack(
        [
            trajectory((5, 6), (7,), group=0, score=0.25, temperature=0.5),
            trajectory((5, 6), (8, 9), group=0, score=None),
            trajectory((10,), (11, 12), group=1, score=0.0, temperature=2.0),  # a reward of 0 is a reward
        ]
    )
    assert batch.tokens.tolist() == [5, 6, 7, 10, 11, 12] and batch.tokens.dtype == torch.int64
    assert batch.lengths == (3, 3)
    assert batch.loss_mask.tolist() == [False, False, True, False, True, True] and batch.loss_mask.dtype == torch.bool
    assert batch.temperature.tolist() == [0.5] * 3 + [2.0] * 3 and batch.temperature.dtype == torch.float32
    assert batch.rollout_logprobs.tolist() == [0, 0, -0.5, 0, -0.5, -1.0]
    assert batch.groups.tolist() == [0, 1] and batch.groups.dtype == torch.int64
    assert batch.rewards.tolist() == [0.25, 0.0] and batch.rewards.dtype == torch.float32
    assert (batch.num_sequences, batch.num_tokens) == (2, 6)
    assert batch.per_token(torch.tensor([3.0, 4.0])).tolist() == [3.0] * 3 + [4.0] * 3


def test_pack_masks_truncated_answers_only_when_asked() -> None:
    given = [trajectory((5,), (6, 7), reason="length"), trajectory((5,), (8,), score=0.0)]
    assert pack(given).loss_mask.tolist() == [False, True, True, False, True]
    masked = pack(given, mask_truncated=True)
    assert masked.loss_mask.tolist() == [False, False, False, False, True]
    assert masked.rewards.tolist() == [1.0, 0.0]


def test_nothing_judged_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of 2 answers"):
        pack([trajectory((5,), (6,), score=None)] * 2)


def test_pack_supervised_trains_on_answers() -> None:
    batch = pack_supervised([((5, 6), (7,)), ((8,), (9, 10))])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.lengths == (3, 3)
    assert batch.loss_mask.tolist() == [False, False, True, False, True, True]
    assert batch.temperature.tolist() == [1.0] * 6
    assert batch.rollout_logprobs.shape == (6,) and batch.groups.shape == batch.rewards.shape == (2,)


# ---------------------------------------------------------------- Batch


def labelled(lengths: list[int]) -> Batch:
    """Every column is a function of the token's (or the sequence's) number, so that a misplaced value shows."""
    total, token = sum(lengths), torch.arange(sum(lengths))
    number = torch.arange(len(lengths))
    return Batch(
        tokens=token,
        lengths=tuple(lengths),
        loss_mask=token % 3 == 1,
        temperature=token + 0.5,
        rollout_logprobs=-token.float(),
        groups=number * 7,
        rewards=number + 0.25,
        old_logprobs=-2.0 * token,
        ref_logprobs=-3.0 * token,
        log_kept_mass=-4.0 * token,
        weight_versions=5 * token,
        baselines=number - 0.5,
        values=6.0 * token,
        returns=7.0 * token,
        kl_weights=8.0 * token,
        advantages=torch.repeat_interleave(number, torch.tensor(lengths)) * 10.0,
        loss_weights=token / total,
    )


def assert_picked(got: Batch, whole: Batch, sequences: list[int]) -> None:
    """``got`` holds exactly these sequences of ``whole``, in this order, column by column."""
    starts = list(itertools.accumulate(whole.lengths, initial=0))
    tokens = [t for s in sequences for t in range(starts[s], starts[s + 1])]
    assert got.lengths == tuple(whole.lengths[s] for s in sequences)
    for f in fields(Batch):
        if f.name != "lengths":
            source = getattr(whole, f.name).tolist()
            expected = [source[i] for i in (sequences if f.name in PER_SEQUENCE else tokens)]
            assert getattr(got, f.name).tolist() == expected, f.name


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, data=st.data())
def test_select_keeps_columns_aligned(lengths: list[int], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=10))
    batch = labelled(lengths)
    assert_picked(batch.select(chosen), batch, chosen)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, max_tokens=st.integers(1, 30))
def test_microbatches_are_runs_of_whole_sequences(lengths: list[int], max_tokens: int) -> None:
    batch = labelled(lengths)
    done = 0
    for micro in batch.microbatches(max_tokens):
        assert_picked(micro, batch, list(range(done, done + micro.num_sequences)))
        assert micro.num_tokens <= max_tokens or micro.num_sequences == 1
        done += micro.num_sequences
        if done < len(lengths):  # the next sequence didn't fit any more
            assert micro.num_tokens + lengths[done] > max_tokens
    assert done == len(lengths)


def test_a_sequence_over_the_limit_is_a_microbatch_of_its_own() -> None:
    assert [m.lengths for m in labelled([2, 3, 50, 4, 1]).microbatches(6)] == [(2, 3), (50,), (4, 1)]


def test_select_leaves_empty_columns_empty() -> None:
    batch = pack_supervised([((1,), (2,)), ((3,), (4, 5))]).select([1])
    assert batch.old_logprobs is None and batch.loss_weights is None
    assert batch.tokens.tolist() == [3, 4, 5]


def test_a_column_that_nobody_filled_is_an_error() -> None:
    batch = pack_supervised([((1,), (2,))])
    with pytest.raises(ValueError, match=r"no 'ref_logprobs'; it is filled by Reference\.score"):
        batch.column("ref_logprobs")
    filled = batch.replace(ref_logprobs=torch.tensor([0.0, -1.0]))
    assert filled.column("ref_logprobs").tolist() == [0.0, -1.0]
    assert batch.ref_logprobs is None


# ---------------------------------------------------------------- the decoder on a packed batch


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any]:
    """A random qwen3, written by transformers and read by us, and transformers' own in float64."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # probabilities that differ
    folder = tmp_path_factory.mktemp("qwen3")
    theirs.save_pretrained(folder)
    return load_model(folder, tokenizer=False).decoder, theirs.double()


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Lengths below, at and above the attention's block of 32; three temperatures; one answer left out."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i, (prompt, answer) in enumerate([(3, 5), (1, 1), (31, 40), (20, 12), (7, 26), (12, 33)]):
        ids = torch.randint(VOCAB, (prompt + answer,), generator=generator).tolist()
        reason = "length" if i == 3 else "stop"
        kept = trajectory(tuple(ids[:prompt]), tuple(ids[prompt:]), reason=reason, temperature=(1.0, 0.6, 1.7)[i % 3])
        made.append(kept)
    return pack(made, mask_truncated=True)


@torch.no_grad()
def expected_columns(theirs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T] by transformers, one sequence at a time; 0 where not trained."""
    logprobs, entropies = [], []
    columns = (column.split(batch.lengths) for column in (batch.tokens, batch.loss_mask, batch.temperature))
    for ids, mask, heat in zip(*columns, strict=True):
        table = torch.log_softmax(theirs(ids[None]).logits[0] / heat[0].double(), -1)
        scores = torch.cat([torch.zeros(1).double(), table[:-1].gather(1, ids[1:, None])[:, 0]])
        spread = torch.cat([torch.zeros(1).double(), -(table.exp() * table).sum(-1)[:-1]])
        logprobs.append(torch.where(mask, scores, 0.0))
        entropies.append(torch.where(mask, spread, 0.0))
    return torch.cat(logprobs), torch.cat(entropies)


def test_logprobs_and_entropies_match_transformers(models: tuple[Decoder, Any], batch: Batch) -> None:
    decoder, theirs = models
    logprobs, entropies = expected_columns(theirs, batch)
    assert logprobs[batch.loss_mask].std() > 1  # they differ from token to token
    scored, got, entropy = forward_logprobs(decoder, batch)
    assert scored.tolist() == [t for t, kept in enumerate(batch.loss_mask.tolist()) if kept]
    assert got.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(got.detach().double(), logprobs[scored], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.detach().double(), entropies[scored], rtol=0, atol=1e-5)


def test_score_tokens_matches_transformers_and_is_zero_elsewhere(models: tuple[Decoder, Any], batch: Batch) -> None:
    decoder, theirs = models
    column = score_tokens(forward_logprobs, decoder, batch.microbatches(60))
    assert column.shape == batch.tokens.shape and column.dtype == torch.float32 and not column.requires_grad
    torch.testing.assert_close(column.double(), expected_columns(theirs, batch)[0], rtol=0, atol=1e-5)
    assert torch.equal(column == 0, ~batch.loss_mask)


def test_scores_do_not_depend_on_the_microbatches(models: tuple[Decoder, Any], batch: Batch) -> None:
    decoder, _ = models
    whole = score_tokens(forward_logprobs, decoder, batch.microbatches(10**6))
    sizes = [1, 50, 80, 120]
    assert len({tuple(m.lengths for m in batch.microbatches(size)) for size in (*sizes, 10**6)}) == 5
    for size in sizes:
        assert torch.equal(score_tokens(forward_logprobs, decoder, batch.microbatches(size)), whole), size
    _, direct, _ = forward_logprobs(decoder, batch)
    assert torch.equal(direct.detach(), whole[batch.loss_mask])


def test_a_microbatch_that_trains_nothing_scores_zero_and_has_a_gradient(models: tuple[Decoder, Any]) -> None:
    """As when every answer of a micro-batch was cut off and ``truncated`` is "mask"."""
    decoder, _ = models
    empty = pack([trajectory((5, 6), (7, 8), reason="length")], mask_truncated=True)
    assert score_tokens(forward_logprobs, decoder, empty.microbatches(100)).tolist() == [0.0] * 4
    _, logprobs, entropy = forward_logprobs(decoder, empty)
    assert logprobs.shape == entropy.shape == (0,)
    decoder.zero_grad()
    logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in decoder.parameters())


def gradients(decoder: Decoder, batch: Batch) -> dict[str, Tensor]:
    decoder.zero_grad()
    scored, logprobs, _ = forward_logprobs(decoder, batch)
    (logprobs * torch.linspace(-1, 1, len(scored))).sum().backward()
    found = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    return found


def test_gradient_checkpointing_changes_no_bit(models: tuple[Decoder, Any], batch: Batch) -> None:
    decoder, _ = models
    plain = gradients(decoder, batch)
    assert plain.keys() == dict(decoder.named_parameters()).keys()
    assert all(g.any() for g in plain.values())
    calls: list[bool] = []
    hook = decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(True))
    decoder.gradient_checkpointing = True
    try:
        recomputed = gradients(decoder, batch)
    finally:
        decoder.gradient_checkpointing = False
        hook.remove()
    assert len(calls) == 2  # once forward, once more in the backward: it was really on
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []
