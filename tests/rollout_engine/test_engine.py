"""The engine's face: what it refuses, how answers end, and what abort, swap and failure leave behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rollout_engine import LLM, CompletionOutput, SamplingParams
from rollout_engine.llm import StaleWeightsError
from rollout_engine.models.checkpoint import Model
from rollout_engine.types import Logprob

MakeLLM = Callable[..., LLM]
Compare = Callable[..., Any]
Prompt = Callable[[int, int], list[int]]


@pytest.fixture
def llm(make_llm: MakeLLM) -> LLM:
    return make_llm(pages=12, max_num_seqs=8, max_batch_tokens=64)


def assert_empty_and_working(llm: LLM, make_llm: MakeLLM) -> None:
    """Nothing in flight, every page free, and the next answers are a new engine's."""
    llm.check_integrity()
    stats = llm.stats()
    assert stats.running_sequences == stats.waiting_sequences == 0
    assert stats.free_pages == stats.total_pages
    assert llm.step() == []
    prompts, params = [[5, 6, 7], [8] * 70], SamplingParams(n=2, max_tokens=6)
    sample_ids = [[1, 2], [3, 4]]
    expected = make_llm().generate(prompts, params, sample_ids=sample_ids)
    found = llm.generate(prompts, params, sample_ids=sample_ids)
    assert [[a.policy_logprobs for a in out.outputs] for out in found] == [
        [a.policy_logprobs for a in out.outputs] for out in expected
    ]


# ---------------------------------------------------------------- what it refuses

BAD_REQUESTS: dict[str, tuple[Callable[[LLM], Any], str]] = {
    "empty prompt": (lambda llm: llm.generate([[]]), "empty prompt"),
    "prompt fills the context": (lambda llm: llm.generate([[1] * 256]), "256 tokens; the context of 256"),
    "id too big": (lambda llm: llm.generate([[1, 131]]), r"span 1\.\.131; the tokenizer has ids 0\.\.130"),
    "id negative": (lambda llm: llm.generate([[-1, 3]]), r"span -1\.\.3"),
    "too many answers": (lambda llm: llm.generate([[1]], SamplingParams(n=9)), "n=9 .* max_num_seqs=8"),
    "answer bigger than the pool": (
        lambda llm: llm.generate([[1]], SamplingParams(max_tokens=384)),
        "256 tokens = 8 KV pages",
    ),
    "few sample ids": (lambda llm: llm.generate([[1], [2]], sample_ids=[[0]]), "2 prompts but 1 sample_ids"),
    "sample ids and n": (lambda llm: llm.generate([[1]], sample_ids=[[0, 1]]), "2 sample ids for n=1"),
    "few params": (lambda llm: llm.generate([[1], [2]], [SamplingParams()]), "2 prompts but 1 params"),
    "text without tokenizer": (lambda llm: llm.generate("hello"), "needs a tokenizer"),
    "unknown prompt key": (lambda llm: llm.generate({"prompt": [1]}), "prompt_token_ids"),
    "add_request": (lambda llm: llm.add_request([]), "empty prompt"),
    "last of many": (lambda llm: llm.generate([[1], [2], [131]]), "span 131"),
    "unknown id": (lambda llm: llm.abort(7), "no request 7 in flight"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request_is_refused_whole(name: str, make_llm: MakeLLM) -> None:
    llm = make_llm(pages=7, max_num_seqs=8, max_batch_tokens=64)
    before = llm.stats()
    call, message = BAD_REQUESTS[name]
    with pytest.raises(ValueError, match=message):
        call(llm)
    assert llm.stats() == before
    assert_empty_and_working(llm, make_llm)


def test_bad_request_leaves_those_in_flight_alone(llm: LLM, make_llm: MakeLLM) -> None:
    expected = make_llm().generate([[9] * 40], SamplingParams(max_tokens=8), sample_ids=[[5]])
    running = llm.add_request([9] * 40, SamplingParams(max_tokens=8), sample_ids=[5])
    llm.step()
    for call, message in BAD_REQUESTS.values():
        if "KV pages" in message:
            continue  # this pool is big enough
        with pytest.raises(ValueError, match=message):
            call(llm)
    finished = [out for _ in range(8) for out in llm.step()]
    assert [out.request_id for out in finished] == [running]
    assert finished[0].outputs[0].policy_logprobs == expected[0].outputs[0].policy_logprobs


@pytest.mark.parametrize("seed", (2**63, 2**64, -(2**63) - 1))
def test_seed_that_philox_cannot_hold_harms_nobody_else(seed: int, llm: LLM) -> None:
    running = llm.add_request([9] * 40, SamplingParams(max_tokens=8, ignore_eos=True))
    llm.step()
    with pytest.raises(ValueError, match="seed"):
        llm.generate([[1]], SamplingParams(seed=seed))
    finished = [out for _ in range(8) for out in llm.step()]
    assert [(out.request_id, len(out.outputs[0].token_ids)) for out in finished] == [(running, 8)]


@pytest.mark.parametrize(
    "field",
    (
        {"n": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"max_tokens": 0},
        {"logprobs": 2},
    ),
    ids=str,
)
def test_bad_sampling_params(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(ValueError, match=f"{name}=.*must be"):
        SamplingParams(**field)


@pytest.mark.parametrize(
    ("argument", "message"),
    (
        ({"gpu_memory_utilization": 0.9}, "kv_cache_gib"),
        ({"max_model_len": 99}, "no argument 'max_model_len'"),
        ({"page_size": 48}, "page_size=48: must be a multiple of 32"),
        ({"page_size": 0}, "page_size=0"),
        ({"kv_cache_gib": 0}, "kv_cache_gib=0: must be a positive"),
        ({"kv_cache_gib": 1e-6}, "holds no page"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0"),
        ({"numerics": "loose"}, "numerics='loose'"),
    ),
    ids=str,
)
def test_bad_engine_arguments(argument: dict[str, Any], message: str, model: Model) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(model, **argument)


# ---------------------------------------------------------------- how prompts come in and answers end


def test_every_form_of_a_prompt_gives_the_same_answer(llm: LLM) -> None:
    params, ids = SamplingParams(max_tokens=5), [[3]]
    forms: tuple[Any, ...] = (
        [[4, 5, 6]],
        [4, 5, 6],
        {"prompt_token_ids": [4, 5, 6]},
        [{"prompt_token_ids": [4, 5, 6]}],
    )
    found = [llm.generate(form, params, sample_ids=ids) for form in forms]
    assert all(len(outputs) == 1 for outputs in found)
    assert len({outputs[0].outputs[0].policy_logprobs for outputs in found}) == 1
    assert found[0][0].prompt_token_ids == (4, 5, 6)
    assert [outputs[0].request_id for outputs in found] == [0, 1, 2, 3]
    assert llm.generate([]) == []


def test_stop_tokens_and_eos(model: Model, make_llm: MakeLLM) -> None:
    def answer(eos: tuple[int, ...] = (), **sampling: Any) -> CompletionOutput:
        llm = make_llm(model=Model(model.decoder, model.hf_config, None, eos))
        return llm.generate([[7, 8]], SamplingParams(**{"max_tokens": 12, "seed": 1, **sampling}))[0].outputs[0]

    free = answer()
    token = free.token_ids[4]
    at = free.token_ids.index(token)
    assert (free.finish_reason, free.stop_reason, len(free.token_ids)) == ("length", None, 12)
    for stopped in (
        answer(stop_token_ids=[130, token]),
        answer(eos=(token,)),
        answer(eos=(130, token)),
        answer(eos=(token,), stop_token_ids=(token,), ignore_eos=True),
    ):
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
        assert stopped.token_ids == free.token_ids[: at + 1]
        assert stopped.policy_logprobs == free.policy_logprobs[: at + 1]
    assert answer(eos=(token,), ignore_eos=True) == free
    last = answer(stop_token_ids=[token], max_tokens=at + 1)
    assert last.finish_reason == "stop"


@pytest.mark.parametrize(("length", "room"), ((255, 1), (250, 6), (200, 20)))
def test_the_context_caps_the_answer(length: int, room: int, llm: LLM, prompt: Prompt) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    (answer,) = llm.generate([prompt(length, 0)], params)[0].outputs
    assert (len(answer.token_ids), answer.finish_reason) == (room, "length")


def test_logprobs_in_vllms_shape(llm: LLM) -> None:
    plain, zero, one = (llm.generate([[4, 5]], SamplingParams(seed=3, logprobs=k))[0].outputs[0] for k in (None, 0, 1))
    assert plain.logprobs is None
    assert one.logprobs == zero.logprobs
    assert one.logprobs == [
        {token: Logprob(x)} for token, x in zip(plain.token_ids, plain.policy_logprobs, strict=True)
    ]
    assert one.cumulative_logprob == sum(plain.policy_logprobs) < 0


def test_seed_of_the_request_and_of_the_engine(make_llm: MakeLLM) -> None:
    def tokens(llm: LLM, seed: int | None) -> list[tuple[int, ...]]:
        params = SamplingParams(n=3, seed=seed, max_tokens=8, ignore_eos=True)
        company = SamplingParams(n=2, max_tokens=8)
        return [answer.token_ids for answer in llm.generate([[1, 2], [3, 4]], [company, params])[1].outputs]

    first = make_llm(seed=0)
    seeded = tokens(first, 7)
    assert seeded == tokens(first, 7)
    assert seeded == tokens(make_llm(seed=99), 7)
    assert seeded == [
        a.token_ids
        for a in first.generate([[3, 4]], SamplingParams(3, seed=7, max_tokens=8, ignore_eos=True))[0].outputs
    ]
    assert len({*seeded, *tokens(first, 8), *tokens(first, None), *tokens(make_llm(seed=1), None)}) == 12
    assert tokens(make_llm(seed=1), None) == tokens(make_llm(seed=1), None)


def test_generate_returns_its_own_answers_beside_a_queued_request(llm: LLM) -> None:
    queued = llm.add_request([1, 2, 3], SamplingParams(max_tokens=1))
    outputs = llm.generate([[4, 5]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert [out.prompt_token_ids for out in outputs] == [(4, 5)]
    assert len(outputs[0].outputs[0].token_ids) == 5
    llm.invalidate("test")
    with pytest.raises(StaleWeightsError):
        llm.step()
    llm.publish(1)
    assert [out.request_id for out in llm.step()] == [queued]  # the other's answer waited through all of it


# ---------------------------------------------------------------- abort


def test_abort_while_waiting_and_while_prefilling(llm: LLM, make_llm: MakeLLM, prompt: Prompt) -> None:
    first = llm.add_request(prompt(100, 0), SamplingParams(n=4, max_tokens=5))
    second = llm.add_request(prompt(20, 1), SamplingParams(n=2, max_tokens=5), sample_ids=[8, 9])
    assert llm.step() == []  # 64 of the first 100 tokens
    stats = llm.stats()
    assert (stats.running_sequences, stats.waiting_sequences, stats.forwarded) == (4, 2, 64)
    waiting = llm.abort(second)
    assert [(a.index, a.sample_id) for a in waiting.outputs] == [(0, 8), (1, 9)]
    prefilling = llm.abort(first)
    assert prefilling.request_id == first
    for answer in (*waiting.outputs, *prefilling.outputs):
        assert (answer.finish_reason, answer.stop_reason, answer.token_ids) == ("abort", None, ())
        assert answer.policy_logprobs == answer.weight_versions == ()
    assert len(prefilling.outputs) == 4
    with pytest.raises(ValueError, match=f"no request {first} in flight"):
        llm.abort(first)
    assert (llm.stats().aborted_requests, llm.stats().finished_requests) == (2, 0)
    assert_empty_and_working(llm, make_llm)


def test_abort_while_decoding_keeps_what_is_there(llm: LLM, make_llm: MakeLLM, compare: Compare, model: Model) -> None:
    params = SamplingParams(n=4, max_tokens=8, ignore_eos=True)
    free = make_llm().generate([[3, 4]], params, sample_ids=[[0, 1, 2, 3]])[0]
    stop = free.outputs[2].token_ids[1]
    assert all(stop not in a.token_ids[:3] for a in free.outputs if a.index != 2)
    stopping = SamplingParams(n=4, max_tokens=8, ignore_eos=True, stop_token_ids=[stop])
    other = llm.add_request([9, 9], SamplingParams(max_tokens=8, ignore_eos=True))
    request = llm.add_request([3, 4], stopping, sample_ids=[0, 1, 2, 3])
    for _ in range(3):
        assert llm.step() == []
    out = llm.abort(request)
    assert [a.finish_reason for a in out.outputs] == ["abort", "abort", "stop", "abort"]
    assert [a.token_ids for a in out.outputs] == [a.token_ids[: 2 if a.index == 2 else 3] for a in free.outputs]
    assert compare(model.decoder, [out]) == (0.0, 11)
    llm.check_integrity()
    left = [done for _ in range(5) for done in llm.step()]
    assert [(done.request_id, done.outputs[0].finish_reason) for done in left] == [(other, "length")]
    assert_empty_and_working(llm, make_llm)


# ---------------------------------------------------------------- weights


def perturb(model: Model, seed: int) -> None:
    """Other weights in the same place, as an optimizer step leaves them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def test_stale_weights_generate_nothing(llm: LLM, make_llm: MakeLLM) -> None:
    llm.add_request([1, 2], SamplingParams(max_tokens=2, ignore_eos=True))
    llm.step()
    llm.invalidate("the optimizer stepped")
    for call in (llm.step, lambda: llm.generate([[1]])):
        with pytest.raises(StaleWeightsError, match="the optimizer stepped; publish"):
            call()
    with pytest.raises(ValueError, match="version 0 does not follow 0"):
        llm.publish(0)
    with pytest.raises(StaleWeightsError):
        llm.step()
    llm.publish(3)
    assert llm.weight_version == llm.stats().weight_version == 3
    (out,) = llm.step()
    assert out.outputs[0].weight_versions == (0, 3)
    for version in (3, 2, -1):
        with pytest.raises(ValueError, match=f"version {version} does not follow 3"):
            llm.publish(version)
    assert_empty_and_working(llm, make_llm)


@pytest.mark.parametrize("engine", ({}, {"pages": 9}, {"max_batch_tokens": 30}), ids=str)
def test_swap_between_steps(
    engine: dict[str, Any], model: Model, make_llm: MakeLLM, compare: Compare, prompt: Prompt
) -> None:
    llm = make_llm(**{"max_batch_tokens": 256, **engine})
    addresses = llm.parameter_addresses()
    params = SamplingParams(n=3, max_tokens=20, ignore_eos=True)
    for length in (5, 33, 60):
        llm.add_request(prompt(length, length), params)
    decoders = [copy.deepcopy(model.decoder)]
    finished = []
    for version in (1, 2):
        finished += [out for _ in range(6) for out in llm.step()]
        llm.invalidate("swap")
        perturb(model, version)
        llm.publish(version)
        llm.check_integrity()
        decoders.append(copy.deepcopy(model.decoder))
    while llm.scheduler.has_work:
        finished += llm.step()
    assert llm.parameter_addresses() == addresses
    assert sorted(out.request_id for out in finished) == [0, 1, 2]
    compared = [compare(decoder, finished, version=version) for version, decoder in enumerate(decoders)]
    assert [result.gap for result in compared] == [0.0, 0.0, 0.0]
    assert all(result.tokens > 0 for result in compared)
    assert sum(result.tokens for result in compared) == 3 * 3 * 20
    assert compare(decoders[0], finished, version=2).gap > 1e-3  # the versions are told apart
    assert compare(decoders[2], finished, version=0).gap > 1e-3
    for out in finished:
        assert all(list(a.weight_versions) == sorted(a.weight_versions) for a in out.outputs)
    stats = llm.stats()
    assert stats.recomputed > 0
    assert stats.free_pages == stats.total_pages


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("when", "error"), (("before", RuntimeError), ("after", RuntimeError), ("before", KeyboardInterrupt))
)
def test_failing_forward_leaves_an_empty_working_engine(
    when: str,
    error: type[BaseException],
    llm: LLM,
    make_llm: MakeLLM,
    prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm.add_request(prompt(40, 2), SamplingParams(n=3, max_tokens=9))
    llm.step()
    run = llm.runner.run

    def fail(step: Any) -> None:
        if when == "after":
            run(step)
        raise error("out of memory")

    asked = [prompt(60, 1), [5, 6, 7], [8] * 70]  # the last two are asked again below: their keys are registered now
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner, "run", fail)
        with pytest.raises(error, match="out of memory"):
            llm.generate(asked, SamplingParams(n=2))
    assert_empty_and_working(llm, make_llm)


def test_reset_prefix_cache_removes_hits(llm: LLM, prompt: Prompt) -> None:
    def cached() -> int:
        return llm.generate([prompt(70, 0)], SamplingParams(max_tokens=2))[0].num_cached_tokens

    assert [cached(), cached()] == [0, 64]
    llm.reset_prefix_cache()
    llm.check_integrity()
    assert [cached(), cached()] == [0, 64]


def test_weights_that_were_nan_leave_nothing_behind(model: Model, make_llm: MakeLLM, prompt: Prompt) -> None:
    llm = make_llm(pages=12, max_num_seqs=8)
    good = copy.deepcopy(model.decoder.state_dict())
    with torch.no_grad():
        model.decoder.layers[1].attention.qkv_proj.weight.fill_(torch.nan)
    llm.publish(1)
    with pytest.raises(FloatingPointError, match="not finite"):
        llm.generate([prompt(90, i) for i in range(3)], SamplingParams(max_tokens=4))
    model.decoder.load_state_dict(good)
    llm.publish(2)
    assert_empty_and_working(llm, make_llm)
