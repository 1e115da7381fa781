"""Any number of data-parallel ranks trains as one: gradients, weights and metrics are those of float64 on the whole
batch; and samples as one: answers are those of a single engine."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_deepspeed_contract import distance, true_gradients

from rlhf.algorithms.grpo import GRPO
from rlhf.cluster.worker import free_port
from rlhf.division import balanced, divide_batch, divide_prompts
from rlhf.packing import forward_logprobs, score_tokens
from rlhf.types import Batch, Prompt
from rollout_engine import LLM, SamplingParams
from rollout_engine.models.checkpoint import load_model

PROGRAM = Path(__file__).with_name("ranks_program.py")
STAGES = (0, 1, 2, 3)
Findings = dict[Any, list[dict[str, Any]]]  # by case, rank by rank
SPLITS = (100_000, 200, 60)  # tokens per micro-batch: everything at once, some sequences, one or two
LR = 1e-4  # Adam's first step turns a gradient of rounding noise into a whole step: at 1e-3 it is 6e-6 of the weights


def random_batch(checkpoint: Path, lengths: list[int]) -> Batch:
    """Random sequences whose second half trains, with the checkpoint's own log-probs as the sampler's."""
    generator = torch.Generator().manual_seed(len(lengths))
    total = sum(lengths)
    mask = torch.cat([torch.arange(n) >= (n + 1) // 2 for n in lengths])
    batch = Batch(
        tokens=torch.randint(1, 131, (total,), generator=generator),
        lengths=tuple(lengths),
        loss_mask=mask,
        temperature=torch.full((total,), 0.9),
        rollout_logprobs=torch.zeros(total),
        groups=torch.arange(len(lengths)) // 2,
        rewards=torch.rand(len(lengths), generator=generator),
    )
    decoder = load_model(checkpoint, tokenizer=False).decoder
    batch = batch.replace(rollout_logprobs=score_tokens(forward_logprobs, decoder, [batch]))
    algorithm = GRPO()
    return next(algorithm.minibatches(algorithm.advantages(batch), 24))


def run_on_ranks(folder: Path, jobs: list[dict[str, Any]], ranks: int) -> list[list[dict[str, Any]]]:
    """Each job's findings, rank by rank."""
    torch.save(jobs, folder / "jobs.pt")
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), str(rank), str(ranks), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=400)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in started:
            process.kill()
    found = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]
    return [list(job) for job in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def batches(odd_checkpoint: Path) -> dict[str, Batch]:
    rng = random.Random(0)
    plenty = random_batch(odd_checkpoint, [rng.randrange(4, 90) for _ in range(12)] + [200])
    advantages = plenty.column("advantages").clone()
    advantages[plenty.loss_mask.nonzero()[0]] = math.nan  # of the first sequence: one rank alone sees it
    return {
        "plenty": plenty,
        "one": random_batch(odd_checkpoint, [30]).replace(advantages=torch.full((30,), 0.7)),
        "nan": plenty.replace(advantages=advantages),
    }


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rng = random.Random(1)
    return [Prompt(i, "", tuple(rng.randrange(1, 131) for _ in range(rng.randrange(1, 50)))) for i in range(5)]


@pytest.fixture(scope="module", params=(1, 2), ids=("one rank", "two ranks"))
def findings(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    odd_checkpoint: Path,
    batches: dict[str, Batch],
    prompts: list[Prompt],
) -> Iterator[Findings]:
    """What the ranks made of every (stage, micro-batch size, batch)."""
    common = {"checkpoint": odd_checkpoint, "algorithm": GRPO(updates_per_rollout=2), "lr": LR}
    jobs: dict[Any, dict[str, Any]] = {}
    for stage in STAGES:
        for name in ("plenty", "one"):
            for size in SPLITS if name == "plenty" else SPLITS[:1]:
                made = batches[name].replace(old_logprobs=batches[name].rollout_logprobs)
                jobs[stage, size, name] = {
                    **common,
                    "stage": stage,
                    "max_tokens": size,
                    "gradients": made,
                    "score": made,
                    "update": made,
                    "prompts": prompts,
                }
        nan = batches["nan"].replace(old_logprobs=batches["nan"].rollout_logprobs)
        jobs[stage, SPLITS[-1], "nan"] = {**common, "stage": stage, "max_tokens": SPLITS[-1], "update": nan}
    folder = tmp_path_factory.mktemp("ranks")
    yield dict(zip(jobs, run_on_ranks(folder, list(jobs.values()), request.param), strict=True))


@pytest.fixture(scope="module")
def truths(odd_checkpoint: Path, batches: dict[str, Batch]) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients in float64, by batch."""
    return {name: true_gradients(odd_checkpoint, batches[name]) for name in ("plenty", "one")}


def true_weights(folder: Path, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One AdamW step in float64 from the checkpoint (Loshchilov & Hutter 2019, no decay): at the first step the
    bias-corrected moments are g and g * g."""
    decoder = load_model(folder, tokenizer=False).decoder
    return {
        name: p.detach().double() - LR * gradients[name] / (gradients[name].abs() + 1e-8)
        for name, p in decoder.named_parameters()
    }


CASES = [
    (stage, size, name) for stage in STAGES for size, name in [*((s, "plenty") for s in SPLITS), (SPLITS[0], "one")]
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_make_the_gradient_and_the_weights_of_one(
    findings: Findings, truths: dict[str, dict[str, torch.Tensor]], odd_checkpoint: Path, case: Any
) -> None:
    """'one' is a single sequence: a second rank, which has none, runs along."""
    truth = truths[case[2]]
    for rank in findings[case]:
        assert distance(rank["gradients"], truth) < 1e-6
        assert distance(rank["weights"], true_weights(odd_checkpoint, truth)) < 1e-6
        assert (rank["version"], rank["changed"]) == (1, True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_report_the_same_metrics_and_no_gap(
    findings: Findings, truths: dict[str, dict[str, torch.Tensor]], case: Any
) -> None:
    first, *others = findings[case]
    assert all(other["metrics"] == first["metrics"] for other in others)
    assert first["metrics"]["rollout/logprob_gap_max"] == 0.0
    norm = math.sqrt(sum(g.square().sum().item() for g in truths[case[2]].values()))
    assert first["metrics"]["policy/grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_come_back_in_order_and_bitwise(findings: Findings, batches: dict[str, Batch], case: Any) -> None:
    batch = batches[case[2]]
    _, join = divide_batch(len(findings[case]), batch)
    joined = join([rank["share"] for rank in findings[case]])
    assert torch.equal(joined.tokens, batch.tokens)
    assert torch.equal(joined.column("old_logprobs"), batch.rollout_logprobs)


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_skips_the_step_on_all(findings: Findings, odd_checkpoint: Path, stage: int) -> None:
    start = {name: p.detach() for name, p in load_model(odd_checkpoint, tokenizer=False).decoder.named_parameters()}
    for rank in findings[stage, SPLITS[-1], "nan"]:
        assert rank["metrics"]["policy/skipped_updates"] == 1 and not rank["changed"]
        assert all(torch.equal(p, start[name]) for name, p in rank["weights"].items())


def alone(folder: Path, weights: dict[str, torch.Tensor], prompts: list[Prompt]) -> list[list[Any]]:
    """What an engine without a trainer answers with these weights: tokens and log-probs of each sample."""
    model = load_model(folder, tokenizer=False)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            parameter.copy_(weights.get(name, parameter))
    llm = LLM(model, seed=7, kv_cache_gib=0.02, max_num_seqs=3, prefix_caching=False)
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts],
        SamplingParams(n=2, max_tokens=16),
        sample_ids=[[2 * i, 2 * i + 1] for i in range(len(prompts))],
    )
    return [[(a.sample_id, a.token_ids, a.policy_logprobs) for a in out.outputs] for out in outputs]


@pytest.fixture(scope="module")
def untrained(odd_checkpoint: Path, prompts: list[Prompt]) -> list[list[Any]]:
    return alone(odd_checkpoint, {}, prompts)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_and_logprobs_are_those_of_one_engine_alone(
    findings: Findings, odd_checkpoint: Path, prompts: list[Prompt], untrained: list[list[Any]], case: Any
) -> None:
    """Bit for bit, before the update and after it; and the trainer's forward gives the same log-probs."""

    def found(moment: str) -> list[list[Any]]:
        answers = dict(pair for rank in findings[case] for pair in rank[moment])
        return [[(c.sample_id, c.token_ids, c.logprobs) for c in answers[i]] for i in range(len(prompts))]

    assert found("before") == untrained
    assert found("after") == alone(odd_checkpoint, findings[case][0]["weights"], prompts) != untrained
    assert [rank["gap"] for rank in findings[case]] == [0.0] * len(findings[case])


@pytest.mark.parametrize("stage", STAGES)
def test_collectives_are_bounded_as_calls_are(findings: dict[Any, list[dict[str, Any]]], stage: int) -> None:
    """torch.distributed's own default is half an hour."""
    assert {rank["timeout"] for rank in findings[stage, SPLITS[-1], "nan"]} == {timedelta(seconds=120)}


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 9))
def test_a_balanced_division_loses_nothing_and_is_nearly_even(sizes: list[int], ranks: int) -> None:
    shares = balanced(sizes, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    if len(sizes) >= ranks:
        assert min(map(len, shares)) >= 1


def test_prompts_keep_their_numbers(prompts: list[Prompt]) -> None:
    calls, _ = divide_prompts(2, prompts, SamplingParams(), first_sample_id=40)
    given_out = {g: p for call in calls for g, p in zip(call["groups"], call["prompts"], strict=True)}
    assert given_out == dict(enumerate(prompts))
    assert {call["first_sample_id"] for call in calls} == {40}


def test_joining_fewer_sequences_than_ranks_drops_the_filler(batches: dict[str, Batch]) -> None:
    one = batches["one"]
    calls, join = divide_batch(3, one)
    assert sorted(call["batch"].num_tokens for call in calls) == [1, 1, 30]
    assert sum(int(call["batch"].loss_mask.sum()) for call in calls) == int(one.loss_mask.sum())
    back = join([replace(call["batch"]) for call in calls])
    assert back.lengths == one.lengths and torch.equal(back.tokens, one.tokens)
