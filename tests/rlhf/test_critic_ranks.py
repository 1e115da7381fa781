"""Two ranks of the critic learn as one: values, loss, gradient norm and weights are those of float64 on the whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_deepspeed_contract import distance
from test_ranks import run_on_ranks
from torch import Tensor
from transformers import Qwen3ForSequenceClassification

from rlhf.algorithms.ppo import PPO
from rlhf.division import divide_batch
from rlhf.types import Batch
from rollout_engine.models.checkpoint import load_hf_config, name_map
from rollout_engine.models.decoder import ScalarDecoder
from rollout_engine.models.qwen3 import decoder_config

STAGES = (0, 2, 3)
SPLITS = (100_000, 60)
LR = 1e-4
CLIP = 0.3
ALGORITHM = PPO(value_clip=CLIP)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Pairs of sequences of very different lengths, whose second half trains; some values are out of the clip."""
    generator = torch.Generator().manual_seed(0)
    lengths = (90, 12, 4, 55, 7, 7, 31, 18, 120)
    total = sum(lengths)
    made = Batch(
        tokens=torch.randint(1, 131, (total,), generator=generator),
        lengths=lengths,
        loss_mask=torch.cat([torch.arange(n) >= (n + 1) // 2 for n in lengths]),
        temperature=torch.ones(total),
        rollout_logprobs=torch.zeros(total),
        groups=torch.arange(len(lengths)) // 2,
        rewards=torch.zeros(len(lengths)),
        values=torch.randn(total, generator=generator),
        returns=torch.randn(total, generator=generator),
    )
    return ALGORITHM.weighed(made, 24)


@pytest.fixture(scope="module")
def findings(
    tmp_path_factory: pytest.TempPathFactory, scored_checkpoint: Path, batch: Batch
) -> dict[Any, list[dict[str, Any]]]:
    """What two ranks made of it, by (stage, micro-batch size)."""
    common = {"checkpoint": scored_checkpoint, "algorithm": ALGORITHM, "lr": LR, "critic": batch}
    jobs = {(stage, size): {**common, "stage": stage, "max_tokens": size} for stage in STAGES for size in SPLITS}
    return dict(zip(jobs, run_on_ranks(tmp_path_factory.mktemp("ranks"), list(jobs.values()), 2), strict=True))


@pytest.fixture(scope="module")
def truth(scored_checkpoint: Path, batch: Batch) -> tuple[Tensor, float, dict[str, Tensor], dict[str, Tensor]]:
    """transformers in float64, a sequence at a time: values [T], loss, gradients, and the weights after one AdamW step
    (Loshchilov & Hutter 2019, no decay), whose bias-corrected moments are g and g * g."""
    model = Qwen3ForSequenceClassification.from_pretrained(scored_checkpoint, attn_implementation="eager").double()
    columns, begin = [], 0
    for length in batch.lengths:
        ids = batch.tokens[begin : begin + length]
        hidden = model.model(input_ids=ids[None]).last_hidden_state[0]
        columns.append((hidden @ model.score.weight[0]).roll(1))  # what is said before the token
        begin += length
    values = torch.cat(columns) * batch.loss_mask
    v, old, returns = (x[batch.loss_mask].double() for x in (values, batch.column("values"), batch.column("returns")))
    within = torch.minimum(torch.maximum(v, old - CLIP), old + CLIP)
    loss = torch.maximum((v - returns) ** 2, (within - returns) ** 2).mean() / 2
    loss.backward()
    names = name_map(ScalarDecoder(decoder_config(model.config)), load_hf_config(scored_checkpoint))
    theirs = dict(model.named_parameters())
    gradients = {ours: torch.cat([theirs[part].grad for part in parts]) for ours, parts in names.items()}
    start = {ours: torch.cat([theirs[part].detach() for part in parts]) for ours, parts in names.items()}
    weights = {name: p - LR * gradients[name] / (gradients[name].abs() + 1e-8) for name, p in start.items()}
    return values.detach(), loss.item(), gradients, weights


CASES = pytest.mark.parametrize("case", [(stage, size) for stage in STAGES for size in SPLITS], ids=str)


@CASES
def test_two_ranks_learn_as_one(findings: dict[Any, list[dict[str, Any]]], truth: Any, case: tuple[int, int]) -> None:
    _, loss, gradients, weights = truth
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    for rank in findings[case]:
        assert rank["metrics"]["critic/loss"] == pytest.approx(loss, rel=1e-6)
        assert rank["metrics"]["critic/grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert 0 < rank["metrics"]["critic/clip_fraction"] < 1
        assert distance(rank["weights"], weights) < 1e-6
    assert findings[case][0]["metrics"] == findings[case][1]["metrics"]


@CASES
def test_values_come_back_in_order(
    findings: dict[Any, list[dict[str, Any]]], batch: Batch, truth: Any, case: tuple[int, int]
) -> None:
    _, join = divide_batch(2, batch)
    joined = join([rank["share"] for rank in findings[case]])
    assert torch.equal(joined.tokens, batch.tokens) and truth[0].std() > 0.1
    assert (joined.column("values") - truth[0]).abs().max() < 1e-6 * truth[0].abs().max()
