"""Reward models: loss, gradients and scores are those of transformers in float64, however the pairs are divided."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from rlhf.cluster.worker import Rendezvous, set_rendezvous
from rlhf.config import ModelSection, Train
from rlhf.division import divide_pairs, divide_sequences, divide_update
from rlhf.functional import pairwise_loss
from rlhf.reward_model.config import PairsSection
from rlhf.reward_model.pairs import Pair, Pairs
from rlhf.roles.reward_model import RewardLearner, RewardModel, pair_loss
from rollout_engine.models.checkpoint import load_scalar_model, name_map, save_model

LAST = PairsSection(batch_size=4, steps=1)
TOKENS = PairsSection(batch_size=4, steps=1, compare="tokens", center_coef=0.05)
SPLITS = (100_000, 90, 1)  # tokens per micro-batch: all at once, some, each pair by itself


def random_ids(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, 250) for _ in range(length))


def random_pairs(count: int) -> Pairs:
    """Prompts of 1 to 40 tokens, answers of 1 to 20, every other pair with a margin."""
    rng = random.Random(count)
    made = []
    for i in range(count):
        prompt = random_ids(rng, rng.randrange(1, 41))
        answers = (random_ids(rng, rng.randrange(1, 21)) for _ in range(2))
        chosen, rejected = ((*prompt, *answer) for answer in answers)
        if made and i % 3 == 0:  # a second pair with the same chosen answer
            chosen, rejected = made[-1].chosen, (*made[-1].rejected[:-1], 251, 252)
        made.append(Pair(chosen, rejected, margin=i % 2 * 0.75))
    return Pairs.mean(made)


@pytest.fixture(scope="module")
def scalar_checkpoint(chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny chat model with a random scalar head."""
    model = load_scalar_model(chat_checkpoint)
    torch.nn.init.normal_(model.decoder.score.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("scalar") / "hf"
    save_model(model, folder)
    return folder


@pytest.fixture
def make_learner(scalar_checkpoint: Path, tmp_path: Path) -> Callable[..., RewardLearner]:
    if not torch.distributed.is_initialized():
        set_rendezvous(Rendezvous.here())

    def make(checkpoint: Path = scalar_checkpoint, **train: object) -> RewardLearner:
        return RewardLearner(
            checkpoint=checkpoint,
            run_folder=tmp_path,
            model=ModelSection(),
            train=Train(**{"lr": 1e-3, "max_grad_norm": 1e9, **train}),
            section=LAST,
            total_updates=10,
            timeout_s=300,
        )

    return make


def judge_of(folder: Path, tokens_per_microbatch: int = 8192) -> RewardModel:
    train = Train(lr=0, tokens_per_microbatch=tokens_per_microbatch)
    return RewardModel(checkpoint=folder, model=ModelSection(), train=train, timeout_s=300)


def theirs(folder: Path, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.to(dtype)


def true_scores(model: torch.nn.Module, sequences: list[tuple[int, ...]]) -> torch.Tensor:
    """One sequence at a time, by transformers."""
    return torch.cat([model(torch.tensor([ids])).logits[0] for ids in sequences])


def true_loss(model: torch.nn.Module, pairs: Pairs, section: PairsSection = LAST) -> torch.Tensor:
    """The mean over the pairs of -log(1 / (1 + e^-(lead - margin))) + center_coef (chosen + rejected)^2. With
    ``tokens``, of each pair's mean over the positions that both answers have from the first difference on, and over
    the two ends if they are elsewhere."""
    losses = []
    for pair in pairs.pairs:
        c, r = (model.score(model.model(torch.tensor([ids]))[0])[0, :, 0] for ids in (pair.chosen, pair.rejected))
        both = range(min(len(c), len(r)))
        first = min(i for i in both if pair.chosen[i] != pair.rejected[i])
        at = [(i, i) for i in both if i >= first] if section.compare == "tokens" else []
        if section.compare == "last" or len(c) != len(r):
            at.append((len(c) - 1, len(r) - 1))
        terms = [
            -torch.log(1 / (1 + torch.exp(-(c[i] - r[j] - pair.margin)))) + section.center_coef * (c[i] + r[j]) ** 2
            for i, j in at
        ]
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()


def true_gradients(folder: Path, pairs: Pairs, section: PairsSection = LAST) -> dict[str, torch.Tensor]:
    model = theirs(folder)
    true_loss(model, pairs, section).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    ours = load_scalar_model(folder)
    names = name_map(ours.decoder, ours.hf_config)
    return {name: torch.cat([found[part] for part in parts]) for name, parts in names.items()}


def distance(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Relative distance of two gradients, all parameters together."""
    assert set(found) == set(truth)
    error = sum((found[name].double() - truth[name]).square().sum() for name in truth)
    return math.sqrt(error / sum(t.square().sum() for t in truth.values()))


# ---------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "loss"),
    [
        (0.0, 0.0, 0.0, math.log(2)),
        (1.0, 0.0, 0.0, math.log(1 + math.exp(-1))),
        (1.0, 0.0, 1.0, math.log(2)),  # the lead is the margin: as if there were no lead
        (0.5, 2.0, 0.25, math.log(1 + math.exp(1.75))),
        (-900.0, 100.0, 0.0, 1000.0),  # no overflow
        (100.0, -900.0, 0.0, 0.0),
    ],
)
def test_loss_by_hand(chosen: float, rejected: float, margin: float, loss: float) -> None:
    columns = (torch.tensor([x]) for x in (chosen, rejected, margin))
    assert pairwise_loss(*columns).item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("section", [LAST, TOKENS], ids=["last", "tokens"])
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("size", SPLITS)
def test_gradient_and_loss_are_the_same_for_any_split(
    make_learner: Callable[..., RewardLearner], scalar_checkpoint: Path, section: PairsSection, stage: int, size: int
) -> None:
    pairs = random_pairs(7)
    backend = make_learner(zero_stage=stage).learner.backend
    held: dict[str, torch.Tensor] = {}

    def loss_fn(engine: torch.nn.Module, micro: Pairs) -> torch.Tensor:
        return pair_loss(engine, micro, section)[0]

    result = backend.step(pairs, size, loss_fn, 0.0, lambda: held.update(backend.gradients()))
    assert distance(held, true_gradients(scalar_checkpoint, pairs, section)) < 1e-6
    assert result.loss == pytest.approx(true_loss(theirs(scalar_checkpoint), pairs, section).item(), rel=1e-6)


def test_the_margin_counts(scalar_checkpoint: Path) -> None:
    """Without it the gradient is another one: the test above would notice."""
    pairs = random_pairs(7)
    without = Pairs.mean([Pair(pair.chosen, pair.rejected) for pair in pairs.pairs])
    assert distance(true_gradients(scalar_checkpoint, without), true_gradients(scalar_checkpoint, pairs)) > 0.01


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_ranks_add_up_to_the_whole(scalar_checkpoint: Path, ranks: int) -> None:
    """Losses of the shares are sums that only need adding, also where a rank has nothing but a filler."""
    pairs = random_pairs(7)
    decoder = load_scalar_model(scalar_checkpoint).decoder
    calls, _ = divide_update(ranks, pairs)
    sum(pair_loss(decoder, call["pairs"], LAST)[0] for call in calls).backward()
    held = {name: p.grad for name, p in decoder.named_parameters()}
    assert distance(held, true_gradients(scalar_checkpoint, pairs)) < 1e-6
    counted = [len(pair_loss(decoder, call["pairs"], LAST)[1]["accuracy"]) for call in calls]
    assert sum(counted) == 7 and len(counted) == ranks


def test_an_update_says_how_it_went(make_learner: Callable[..., RewardLearner], scalar_checkpoint: Path) -> None:
    pairs = random_pairs(6)
    same = Pair(pairs.pairs[0].chosen, pairs.pairs[0].chosen)  # a tie
    pairs = Pairs.mean([*pairs.pairs, same])
    learner = make_learner(tokens_per_microbatch=60)
    metrics = learner.update(pairs)
    model = theirs(scalar_checkpoint)
    chosen = true_scores(model, [pair.chosen for pair in pairs.pairs])
    rejected = true_scores(model, [pair.rejected for pair in pairs.pairs])
    wins = (chosen > rejected).sum().item() + 0.5
    assert metrics["reward_model/accuracy"] == pytest.approx(wins / 7)
    assert metrics["reward_model/margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert metrics["reward_model/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-5)
    assert metrics["reward_model/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-5)


def test_it_learns_from_a_head_of_zeros(make_learner: Callable[..., RewardLearner], chat_checkpoint: Path) -> None:
    pairs = random_pairs(5)
    learner = make_learner(chat_checkpoint)
    assert learner.score(pairs).eq(0).all()
    for _ in range(15):
        learner.update(pairs)
    scores = learner.score(pairs)
    assert scores.shape == (5, 2) and scores.dtype == torch.float32
    assert (scores[:, 0] > scores[:, 1]).all()


def test_a_non_finite_step_is_skipped(make_learner: Callable[..., RewardLearner], tmp_path: Path) -> None:
    learner = make_learner()
    pairs = random_pairs(3)
    before = learner.score(pairs)
    broken = Pairs((*pairs.pairs[:2], Pair(pairs.pairs[2].chosen, pairs.pairs[2].rejected, math.nan)), pairs.weights)
    assert learner.update(broken)["reward_model/skipped_updates"] == 1
    assert torch.equal(learner.score(pairs), before)
    assert [f.name for f in tmp_path.glob("skipped-*")] == ["skipped-reward_model-update-1-rank-0.pt"]


# ---------------------------------------------------------------- scores


def test_scores_are_those_of_transformers(make_learner: Callable[..., RewardLearner], tmp_path: Path) -> None:
    learner = make_learner()
    pairs = random_pairs(6)
    learner.update(pairs)
    learner.save(tmp_path / "hf")
    sequences = [ids for pair in pairs.pairs for ids in (pair.chosen, pair.rejected)]
    truth = true_scores(theirs(tmp_path / "hf"), sequences)
    judged = judge_of(tmp_path / "hf").judge(sequences)
    assert torch.tensor(judged, dtype=torch.float64).sub(truth).abs().max() < 1e-5
    assert learner.score(pairs).flatten().tolist() == judged  # bit for bit: what was saved is what was trained
    assert [type(score) for score in judged] == [float] * len(judged)


def test_the_end_is_scored_by_transformers_too(chat_checkpoint: Path, tmp_path: Path) -> None:
    """Many tokenizers pad with their end-of-sequence token; transformers would then overlook the answer's end."""
    model = load_scalar_model(chat_checkpoint)
    model.hf_config.pad_token_id = model.tokenizer.eos_token_id
    torch.nn.init.normal_(model.decoder.score.weight)
    save_model(model, tmp_path / "hf")
    sequence = (10, 20, 30, model.tokenizer.eos_token_id)
    truth = true_scores(theirs(tmp_path / "hf"), [sequence])
    assert judge_of(tmp_path / "hf").judge([sequence]) == pytest.approx(truth.tolist(), abs=1e-5)
    assert truth.item() != pytest.approx(judge_of(tmp_path / "hf").judge([sequence[:-1]])[0], abs=1e-3)


@pytest.mark.parametrize("size", SPLITS)
def test_a_score_does_not_depend_on_its_company(scalar_checkpoint: Path, size: int) -> None:
    rng = random.Random(size)
    sequences = [random_ids(rng, rng.randrange(1, 70)) for _ in range(20)]
    sequences += [sequences[0], sequences[1][:1], (*sequences[2], 7)]  # again, a beginning, a longer one
    alone = [judge_of(scalar_checkpoint).judge([ids])[0] for ids in sequences]
    judge = judge_of(scalar_checkpoint, size)
    assert judge.judge(sequences) == alone
    assert judge.judge(sequences[::-1]) == alone[::-1]
    assert judge.judge([]) == []


def test_what_has_no_scalar_head_is_no_reward_model(chat_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"has no scalar head \(score.weight\).*rlhf reward-model CONFIG"):
        judge_of(chat_checkpoint)


def test_an_empty_sequence_has_no_score(scalar_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="sequence 1 of 2 is empty"):
        judge_of(scalar_checkpoint).judge([(1, 2), ()])


# ---------------------------------------------------------------- division over ranks


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(2, 5))
def test_divided_sequences_come_back_in_order(lengths: list[int], ranks: int) -> None:
    sequences = [(i,) * length for i, length in enumerate(lengths)]
    calls, join = divide_sequences(ranks, sequences)
    assert len(calls) == ranks
    assert join([[float(ids[0]) for ids in call["token_ids"]] for call in calls]) == [
        float(ids[0]) for ids in sequences
    ]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12), st.integers(2, 5))
def test_divided_pairs_stay_together_and_come_back_in_order(sizes: list[tuple[int, int]], ranks: int) -> None:
    pairs = Pairs.mean([Pair((i,) * a, (i,) * b) for i, (a, b) in enumerate(sizes)])
    calls, join = divide_pairs(ranks, pairs)
    assert len(calls) == ranks
    shares = [call["pairs"] for call in calls]
    assert sum(weight for share in shares for weight in share.weights) == pytest.approx(1)
    scores = [
        torch.tensor([[p.chosen[0], p.rejected[0]] for p in share.pairs], dtype=torch.float32) for share in shares
    ]
    assert join(scores).tolist() == [[i, i] for i in range(len(sizes))]
