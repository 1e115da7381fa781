"""Reference and reward model divided over two ranks (ZeRO 3): the scores are those of the whole models, bit by bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import random_batch, run_on_ranks

import rollout_engine.models.checkpoint as checkpoint_module
from rlhf.config import ModelSection, Train
from rlhf.division import divide_batch, divide_sequences
from rlhf.packing import forward_logprobs, score_tokens
from rlhf.roles.reward_model import RewardModel
from rlhf.types import Batch
from rollout_engine.models.checkpoint import load_model

SPLITS = (100_000, 60)  # tokens a micro-batch: with the second, the ranks have different numbers of them
STAGES = (0, 3)
CASES = pytest.mark.parametrize("case", [(stage, size) for stage in STAGES for size in SPLITS], ids=str)


@pytest.fixture(scope="module")
def batches(odd_checkpoint: Path) -> list[Batch]:
    """Many sequences, and one: a rank without any runs along."""
    rng = random.Random(0)
    return [
        random_batch(odd_checkpoint, [rng.randrange(4, 90) for _ in range(11)] + [200]),
        random_batch(odd_checkpoint, [30]),
    ]


@pytest.fixture(scope="module")
def sequences() -> list[list[tuple[int, ...]]]:
    rng = random.Random(1)
    return [[tuple(rng.randrange(131) for _ in range(rng.randrange(1, 120))) for _ in range(n)] for n in (9, 1)]


@pytest.fixture(scope="module")
def findings(
    tmp_path_factory: pytest.TempPathFactory,
    odd_checkpoint: Path,
    scored_checkpoint: Path,
    batches: list[Batch],
    sequences: list[list[tuple[int, ...]]],
) -> dict[Any, list[dict[str, Any]]]:
    """What two ranks made of it, by (stage, micro-batch size), or (stage, bfloat16) for those weights."""
    common = {"checkpoint": odd_checkpoint, "scored": scored_checkpoint, "frozen": batches, "sequences": sequences}
    jobs: dict[Any, dict[str, Any]] = {}
    for stage in STAGES:
        for size in SPLITS:
            jobs[stage, size] = {**common, "stage": stage, "max_tokens": size, "dtype": "float32"}
        jobs[stage, "bfloat16"] = {**common, "stage": stage, "max_tokens": SPLITS[1], "dtype": "bfloat16"}
    return dict(zip(jobs, run_on_ranks(tmp_path_factory.mktemp("ranks"), list(jobs.values()), 2), strict=True))


@CASES
def test_the_references_scores_are_the_whole_models(
    findings: dict[Any, list[dict[str, Any]]], odd_checkpoint: Path, batches: list[Batch], case: tuple[int, int]
) -> None:
    whole = load_model(odd_checkpoint, tokenizer=False).decoder
    for i, batch in enumerate(batches):
        _, join = divide_batch(2, batch)
        found = join([rank["shares"][i] for rank in findings[case]]).column("ref_logprobs")
        assert torch.equal(found, score_tokens(forward_logprobs, whole, [batch]))
        assert found[batch.loss_mask].std() > 0.1


@CASES
def test_the_reward_models_scores_are_the_whole_models(
    findings: dict[Any, list[dict[str, Any]]],
    scored_checkpoint: Path,
    sequences: list[list[tuple[int, ...]]],
    case: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint_module, "load_tokenizer", lambda folder: None)
    judge = RewardModel(checkpoint=scored_checkpoint, model=ModelSection(), train=Train(lr=0), timeout_s=60)
    for i, some in enumerate(sequences):
        _, join = divide_sequences(2, some)
        found = join([rank["scores"][i] for rank in findings[case]])
        assert found == judge.judge(some) and len(set(found)) == len(some)


def test_bfloat16_weights_are_divided_too(findings: dict[Any, list[dict[str, Any]]]) -> None:
    """Both ways a rank runs the same micro-batches; in other ones its bits would be others."""
    for whole, divided in zip(findings[0, "bfloat16"], findings[3, "bfloat16"], strict=True):
        assert divided["scores"] == whole["scores"] != findings[3, SPLITS[1]][0]["scores"]
        for ours, theirs in zip(divided["shares"], whole["shares"], strict=True):
            assert torch.equal(ours.column("ref_logprobs"), theirs.column("ref_logprobs"))


@pytest.mark.parametrize("size", SPLITS)
def test_a_rank_holds_its_share_and_gives_back_what_it_gathered(
    findings: dict[Any, list[dict[str, Any]]], odd_checkpoint: Path, size: int
) -> None:
    sizes = {name: p.numel() for name, p in load_model(odd_checkpoint, tokenizer=False).decoder.named_parameters()}
    large = {name for name, numel in sizes.items() if numel > 10_000}  # smaller ones stay whole on every rank
    assert len(large) == 4
    for rank in findings[3, size]:
        assert {name: rank["held"][name] for name in large} == {name: (0, sizes[name] // 2) for name in large}
    for rank in findings[0, size]:
        assert {name: whole for name, (whole, _) in rank["held"].items()} == sizes
