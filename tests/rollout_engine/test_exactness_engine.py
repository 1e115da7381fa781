"""The engine's log-probs are the packed trainer forward's bits, whatever the engine did to get them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional

from kernels import cpu, philox_uniform, sample_tokens
from rollout_engine import LLM, EngineStats, RequestOutput, SamplingParams
from rollout_engine.models.checkpoint import Model

MakeLLM = Callable[..., LLM]
Compare = Callable[..., Any]
Prompt = Callable[[int, int], list[int]]
Answers = list[tuple[tuple[int, ...], tuple[float, ...]]]


@dataclass(frozen=True)
class Case:
    """What the engine is put through, and the counters that show that it really was."""

    engine: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    common: int = 0  # tokens that all prompts begin with
    took_place: Callable[[EngineStats], bool] = lambda stats: stats.preemptions == stats.cached == 0
    n: tuple[int, ...] = (1, 4)


CASES = {
    "plain": Case(),
    "chunked prefill": Case({"max_batch_tokens": 7}, took_place=lambda s: s.steps > 33),
    "one token a step": Case({"max_batch_tokens": 1}, {"max_tokens": 3}, took_place=lambda s: s.steps == s.forwarded),
    "shared prefix": Case(common=64, took_place=lambda s: s.cached == 5 * 64),
    "shared prefix, chunked": Case({"max_batch_tokens": 50}, common=70, took_place=lambda s: s.cached == 5 * 64),
    "tiny pool": Case({"pages": 7}, took_place=lambda s: s.preemptions > 0 and s.recomputed > 0),
    "tiny pool, shared prefix": Case(
        {"pages": 8}, {}, 40, lambda s: s.preemptions > 0 and s.recomputed > 0 and s.cached > 0, n=(4,)
    ),
    "tiny pool, chunked": Case({"pages": 6, "max_batch_tokens": 19}, took_place=lambda s: s.preemptions > 0),
    "pages of 64": Case({"page_size": 64}, common=64, took_place=lambda s: s.cached == 5 * 64),
    "pages of 64, tiny pool": Case({"page_size": 64, "pages": 3}, took_place=lambda s: s.preemptions > 0, n=(4,)),
    "few at once": Case({"max_num_seqs": 4}, took_place=lambda s: s.steps >= 2 * 14),
    "no prefix caching": Case({"prefix_caching": False}, common=64),
    "no prefix caching, tiny pool": Case(
        {"prefix_caching": False, "pages": 7}, common=32, took_place=lambda s: s.preemptions > 0 and s.cached == 0
    ),
    "top-p": Case(sampling={"top_p": 0.7}),
    "top-k": Case(sampling={"top_k": 9}),
    "top-k and top-p, tiny pool": Case(
        {"pages": 7}, {"top_k": 30, "top_p": 0.8}, took_place=lambda s: s.preemptions > 0
    ),
    "cold": Case(sampling={"temperature": 0.3}),
    "hot": Case(sampling={"temperature": 1.7}),
}


def make_prompts(prompt: Prompt, common: int) -> list[list[int]]:
    head = prompt(common, 99)
    return [head + prompt(length, seed) for seed, length in enumerate((1, 31, 32, 33, 64, 70))]


def total_tokens(outputs: Sequence[RequestOutput]) -> int:
    """Tokens that must be forwarded once: each prompt, and each answer but for its last token."""
    return sum(len(out.prompt_token_ids) + sum(len(a.token_ids) - 1 for a in out.outputs) for out in outputs)


@pytest.mark.parametrize(("name", "n"), [(name, n) for name, case in CASES.items() for n in case.n])
def test_logprobs_are_the_trainers(
    name: str, n: int, model: Model, make_llm: MakeLLM, compare: Compare, prompt: Prompt
) -> None:
    case = CASES[name]
    llm = make_llm(**{"max_batch_tokens": 256, **case.engine})
    params = SamplingParams(**{"n": n, "max_tokens": 14, "ignore_eos": True, **case.sampling})
    outputs = llm.generate(make_prompts(prompt, case.common), params)
    stats = llm.stats()
    assert case.took_place(stats), stats
    result = compare(model.decoder, outputs, params.temperature)
    assert result.tokens == 6 * n * params.max_tokens
    assert result.gap == 0.0
    assert stats.forwarded - stats.recomputed == total_tokens(outputs) - stats.cached
    assert stats.cached == sum(out.num_cached_tokens for out in outputs)
    assert stats.sampled == result.tokens
    assert stats.preemptions > 0 or stats.recomputed == 0
    assert stats.free_pages == stats.total_pages
    llm.check_integrity()


@pytest.mark.parametrize("name", ("plain", "tiny pool, chunked"))
def test_logprobs_are_the_trainers_without_a_compiler(
    name: str, model: Model, make_llm: MakeLLM, compare: Compare, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the C++ ops can't be built, all is computed in plain torch."""
    asked: list[None] = []
    monkeypatch.setattr(cpu, "extension", lambda: asked.append(None))
    test_logprobs_are_the_trainers(name, 4, model, make_llm, compare, prompt)
    assert asked


@pytest.mark.parametrize("seed", range(6))
def test_logprobs_are_the_trainers_in_random_settings(
    seed: int, model: Model, make_llm: MakeLLM, compare: Compare, prompt: Prompt
) -> None:
    rng = random.Random(seed)
    page_size = rng.choice((32, 64, 96))
    llm = make_llm(
        page_size=page_size,
        pages=-(-160 // page_size) + rng.randrange(6),
        max_batch_tokens=rng.choice((3, 17, 40, 100, 500)),
        max_num_seqs=rng.randrange(5, 20),
        prefix_caching=rng.random() < 0.8,
    )
    heads = [prompt(rng.randrange(100), 50 + i) for i in range(2)]
    prompts = [rng.choice(heads) + prompt(rng.randrange(1, 30), i) for i in range(5)]
    params = [
        SamplingParams(
            n=rng.randrange(1, 6),
            temperature=rng.choice((0.0, 0.5, 1.0, 1.5)),
            top_k=rng.choice((0, 0, 7)),
            top_p=rng.choice((1.0, 1.0, 0.8)),
            max_tokens=rng.randrange(1, 21),
        )
        for _ in prompts
    ]
    outputs = llm.generate(prompts, params)
    result = compare(model.decoder, outputs, [p.temperature for p in params])
    assert result.tokens > 0
    assert result.gap == 0.0
    stats = llm.stats()
    assert stats.forwarded - stats.recomputed == total_tokens(outputs) - stats.cached


@pytest.mark.parametrize(("engine_threads", "trainer_threads"), ((1, 2), (2, 1)))
def test_threads_change_nothing(
    engine_threads: int,
    trainer_threads: int,
    model: Model,
    make_llm: MakeLLM,
    compare: Compare,
    prompt: Prompt,
    set_threads: Callable[[int], None],
) -> None:
    prompts, params = [prompt(70, 0), prompt(3, 1)], SamplingParams(n=2, max_tokens=4, ignore_eos=True)
    expected = answers(make_llm().generate(prompts, params))
    set_threads(engine_threads)
    outputs = make_llm(max_batch_tokens=64).generate(prompts, params)
    set_threads(trainer_threads)
    assert compare(model.decoder, outputs) == (0.0, 16)
    assert answers(outputs) == expected


# ---------------------------------------------------------------- the noise


def test_trainer_logits_and_the_counter_noise_reproduce_every_token(
    model: Model, make_llm: MakeLLM, prompt: Prompt, pack: Callable[..., Any]
) -> None:
    prompts = make_prompts(prompt, 40)
    settings = ({}, {"temperature": 0.4, "top_p": 0.9}, {"top_k": 5}, {"temperature": 0}, {"seed": 5}, {"seed": -8})
    params = [SamplingParams(n=3, max_tokens=20, **setting) for setting in settings]
    llm = make_llm(pages=16, max_batch_tokens=90, seed=17)
    outputs = llm.generate(prompts, params)
    assert llm.stats().preemptions > 0
    assert llm.stats().cached > 0

    found = [(out, p, answer) for out, p in zip(outputs, params, strict=True) for answer in out.outputs]
    columns: list[tuple[float, ...]] = []
    for out, p, answer in found:
        for t in range(len(answer.token_ids)):
            seed = 17 if p.seed is None else p.seed
            position = len(out.prompt_token_ids) + t
            columns.append((seed, answer.sample_id, position, p.temperature, p.top_k, p.top_p))
    ids, ctx, rows, targets = pack([(out.prompt_token_ids, answer.token_ids) for out, _, answer in found])
    pad = -len(columns) % 8
    seeds, sample_ids, positions, heat, top_k, top_p = torch.tensor(columns + columns[-1:] * pad).double().T
    with torch.no_grad():
        logits = model.decoder.head.logits(model.decoder.hidden(ids, ctx)[rows])
    expected = sample_tokens(
        functional.pad(logits, (0, 0, 0, pad)),
        heat.float(),
        philox_uniform(seeds.long(), sample_ids.long(), positions.long()),
        top_k.long(),
        top_p.float(),
    )
    assert len(targets) > 200
    assert torch.equal(expected.tokens[: len(targets)], targets)
    for name in ("processed_logprobs", "log_kept_mass"):
        engine = torch.tensor([x for _, _, answer in found for x in getattr(answer, name)])
        assert torch.equal(engine, getattr(expected, name)[: len(targets)]), name
    numbers = [[answer.sample_id for answer in out.outputs] for out in outputs]
    assert numbers == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [0, 1, 2], [0, 1, 2]]


def test_greedy_takes_the_likeliest_token_and_reports_temperature_one(
    model: Model, make_llm: MakeLLM, compare: Compare, prompt: Prompt, pack: Callable[..., Any]
) -> None:
    outputs = make_llm().generate([prompt(9, 0), prompt(40, 1)], SamplingParams(temperature=0, max_tokens=20))
    at_one, at_half = compare(model.decoder, outputs, 1.0), compare(model.decoder, outputs, 0.5)
    assert at_one.gap == 0.0
    assert at_one.tokens > 20
    assert at_half.gap > 0.1  # so the comparison knows the temperature
    for out in outputs:
        (answer,) = out.outputs
        ids, ctx, rows, targets = pack([(out.prompt_token_ids, answer.token_ids)])
        with torch.no_grad():
            logits = model.decoder.head.logits(model.decoder.hidden(ids, ctx)[rows])
        assert torch.equal(logits.argmax(-1), targets)
        assert set(answer.processed_logprobs) == {0.0}


# ---------------------------------------------------------------- same tokens whatever the batch


def answers(outputs: Sequence[RequestOutput]) -> Answers:
    return [(answer.token_ids, answer.policy_logprobs) for out in outputs for answer in out.outputs]


VARIANTS: dict[str, dict[str, Any]] = {
    "restart": {},
    "small batches": {"max_batch_tokens": 5},
    "big batches": {"max_batch_tokens": 4096},
    "few at once": {"max_num_seqs": 3},
    "tiny pool": {"pages": 6},
    "other pages": {"page_size": 64},
    "no prefix caching": {"prefix_caching": False},
}


@pytest.fixture
def requests(prompt: Prompt) -> tuple[list[list[int]], list[SamplingParams], list[list[int]]]:
    prompts = make_prompts(prompt, 20)
    params = [
        SamplingParams(n=1 + i % 3, temperature=0.7 + 0.1 * i, top_p=1 - 0.1 * (i % 2), max_tokens=12) for i in range(6)
    ]
    sample_ids = [[100 * i + k for k in range(p.n)] for i, p in enumerate(params)]
    return prompts, params, sample_ids


@pytest.mark.parametrize("name", VARIANTS)
def test_answers_do_not_depend_on_the_engine(name: str, make_llm: MakeLLM, requests: Any) -> None:
    prompts, params, sample_ids = requests
    expected = answers(make_llm(max_batch_tokens=64).generate(prompts, params, sample_ids=sample_ids))
    assert len(set(expected)) == len(expected) == 12
    llm = make_llm(**{"max_batch_tokens": 64, **VARIANTS[name]})
    assert answers(llm.generate(prompts, params, sample_ids=sample_ids)) == expected
    assert answers(llm.generate(prompts, params, sample_ids=sample_ids)) == expected  # now with a warm cache


def test_answers_do_not_depend_on_company_or_order(make_llm: MakeLLM, requests: Any) -> None:
    together = make_llm().generate(requests[0], requests[1], sample_ids=requests[2])
    prompts, params, sample_ids = (column[::-1] for column in requests)
    llm = make_llm(max_batch_tokens=64)
    backwards = llm.generate(prompts, params, sample_ids=sample_ids)
    assert answers(backwards[::-1]) == answers(together)
    alone = [llm.generate(p, s, sample_ids=[i])[0] for p, s, i in zip(*requests, strict=True)]
    assert answers(alone) == answers(together)


def test_another_sample_id_is_another_answer(make_llm: MakeLLM, prompt: Prompt) -> None:
    outputs = make_llm().generate([prompt(9, 0)] * 3, SamplingParams(max_tokens=12), sample_ids=[[3], [4], [3]])
    first, second, again = (out.outputs[0].token_ids for out in outputs)
    assert first == again
    assert first != second


# ---------------------------------------------------------------- the comparison can fail


@pytest.mark.parametrize(
    "name",
    (
        "embed_tokens.weight",
        "layers.0.attention.qkv_proj.weight",
        "layers.1.attention.k_norm.weight",
        "layers.2.mlp.down_proj.weight",
    ),
)
def test_a_weight_that_differs_by_a_millionth_shows(
    name: str, model: Model, make_llm: MakeLLM, compare: Compare, prompt: Prompt
) -> None:
    other = copy.deepcopy(model.decoder)
    with torch.no_grad():
        weight = other.get_parameter(name)
        weight.view(-1)[weight.numel() // 2] += 1e-6
    outputs = make_llm(model=Model(other, model.hf_config, None, model.eos_ids)).generate(
        make_prompts(prompt, 0), SamplingParams(n=2, max_tokens=12)
    )
    assert compare(other, outputs).gap == 0.0
    assert 0 < compare(model.decoder, outputs).gap < 1e-2
