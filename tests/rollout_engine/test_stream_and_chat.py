"""Streams of rows, conversations, the forms of a prompt, and the shortest answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rollout_engine import LLM, SamplingParams, runner
from rollout_engine.models.checkpoint import Model
from rollout_engine.models.context import PackedAttention

MakeLLM = Callable[..., LLM]
Compare = Callable[..., Any]
Prompt = Callable[[int, int], list[int]]
PARAMS = SamplingParams(n=2, max_tokens=8, seed=7)


@pytest.fixture
def llm(make_llm: MakeLLM) -> LLM:
    return make_llm(pages=24, max_num_seqs=8, max_batch_tokens=64)


@pytest.fixture
def text_llm(text_model: Model) -> LLM:
    return LLM(text_model, kv_cache_gib=0.01, max_num_seqs=8)


class Rows:
    """Prompts without end that count how many were asked for."""

    def __init__(self, prompt: Prompt) -> None:
        self.pulled = 0
        self.prompt = prompt

    def __iter__(self) -> Iterator[list[int]]:
        for number in itertools.count():
            self.pulled = number + 1
            yield self.prompt(3 + number % 7, number)


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("ordered", (False, True))
def test_a_stream_gives_what_generate_gives(ordered: bool, llm: LLM, make_llm: MakeLLM, prompt: Prompt) -> None:
    prompts = [prompt(254 if i % 5 == 3 else 3 + i % 40, i) for i in range(30)]  # some leave room for two tokens
    names = [range(2 * i, 2 * i + 2) for i in range(30)]
    expected = make_llm().generate(prompts, PARAMS, sample_ids=names)
    rows = enumerate(prompts)
    outs = list(
        llm.stream(rows, PARAMS, prompt=lambda row: row[1], sample_ids=lambda row: names[row[0]], ordered=ordered)
    )
    positions = [out.position for out in outs]
    assert sorted(positions) == list(range(30))
    assert (positions == sorted(positions)) == ordered
    for out in outs:
        assert out.error is None and out.prompt_token_ids == expected[out.position].prompt_token_ids
        assert [a.policy_logprobs for a in out.outputs] == [a.policy_logprobs for a in expected[out.position].outputs]
    llm.check_integrity()


@pytest.mark.parametrize("n", (1, 2, 3, 8))
def test_an_endless_stream_is_pulled_only_to_keep_the_batch_full(n: int, llm: LLM, prompt: Prompt) -> None:
    rows = Rows(prompt)
    stream = llm.stream(iter(rows), SamplingParams(n=n, max_tokens=5, ignore_eos=True))
    assert rows.pulled == 0
    for given in range(1, 40):
        next(stream)
        assert rows.pulled <= given + 8 // n  # max_num_seqs is 8
        assert llm.stats().waiting_sequences + llm.stats().running_sequences <= 8
    stream.close()
    assert llm.stats().free_pages == llm.stats().total_pages
    assert llm.stats().running_sequences == llm.stats().waiting_sequences == 0
    assert llm.step() == []


def test_a_slow_row_holds_an_ordered_stream_back_within_bounds(make_llm: MakeLLM, prompt: Prompt) -> None:
    """The first prompt leaves room for 60 tokens, later ones for one: the window fills and pulling pauses."""
    llm = make_llm(pages=80, max_num_seqs=8)
    rows = Rows(lambda length, number: prompt(255 if number else 190, number))
    stream = llm.stream(iter(rows), SamplingParams(max_tokens=60, ignore_eos=True), ordered=True)
    assert next(stream).position == 0
    assert rows.pulled == 4 * 8
    assert [next(stream).position for _ in range(40)] == list(range(1, 41))
    assert rows.pulled <= 41 + 4 * 8
    stream.close()


@pytest.mark.parametrize("ordered", (False, True))
def test_a_refused_row_ends_nothing(ordered: bool, llm: LLM) -> None:
    rows = [[4, 5], [], [6, 131], "text", [7], {"messages": []}, None, [1] * 256, [8]]
    outs = sorted(llm.stream(rows, PARAMS, ordered=ordered), key=lambda out: out.position)
    assert [out.position for out in outs if out.error is None] == [0, 4, 8]
    assert all(len(out.outputs) == 2 for out in outs if out.error is None)
    refused = {out.position: out.error for out in outs if out.error}
    assert all(out.outputs == () and out.request_id == -1 for out in outs if out.error)
    for position, words in ((1, "empty"), (2, "span"), (3, "tokenizer"), (6, "integers"), (7, "256 tokens")):
        assert words in refused[position]


def test_what_makes_the_prompt_may_refuse_the_row_but_not_fail_otherwise(llm: LLM) -> None:
    def prompt(row: int) -> list[int]:
        if row == 1:
            raise ValueError("row 1 has no text")
        return [10 // (row - 3)]

    stream = llm.stream(itertools.count(), PARAMS, prompt=prompt, ordered=True)
    with pytest.raises(ZeroDivisionError):  # a mistake in the caller's code is no bad row
        list(stream)
    assert llm.stats().free_pages == llm.stats().total_pages
    outs = list(llm.stream([4, 1], PARAMS, prompt=prompt, ordered=True))
    assert [out.error for out in outs] == [None, "row 1 has no text"]


def test_params_that_no_row_can_run_with_are_refused_at_once(llm: LLM) -> None:
    for params in (
        SamplingParams(n=9),
        SamplingParams(stop="x"),
        SamplingParams(min_tokens=1, stop_token_ids=range(131)),
    ):
        with pytest.raises(ValueError, match=r"max_num_seqs|stop strings|min_tokens"):
            llm.stream(iter(()), params)


def test_a_stream_and_other_callers_get_their_own_answers(llm: LLM, prompt: Prompt) -> None:
    queued = llm.add_request(prompt(9, 0), SamplingParams(max_tokens=2, ignore_eos=True))
    positions = []
    for out in llm.stream([prompt(5, i) for i in range(12)], PARAMS):
        positions.append(out.position)
        (other,) = llm.generate([prompt(4, 99)], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(other.outputs[0].token_ids) == 3 and other.position is None
    assert sorted(positions) == list(range(12))
    assert [out.request_id for out in llm.step()] == [queued]


def test_a_stream_whose_answers_another_caller_took_says_so(llm: LLM, prompt: Prompt) -> None:
    stream = llm.stream([prompt(length, 1) for length in (253, 5)], SamplingParams(max_tokens=20, ignore_eos=True))
    assert next(stream).position == 0  # it had room for three tokens
    while llm.scheduler.has_work:
        llm.step()
    with pytest.raises(RuntimeError, match="another caller"):
        next(stream)


# ---------------------------------------------------------------- prompts and conversations

MESSAGES = [{"role": "user", "content": "the end"}]


def test_every_form_of_a_text_prompt_gives_the_same_answer(text_llm: LLM) -> None:
    tokenizer = text_llm.tokenizer
    forms: list[Any] = ["the end", {"prompt": "the end"}, {"prompt_token_ids": tokenizer.encode("the end")}]
    outs = [text_llm.generate(form, PARAMS)[0] for form in forms]
    assert len({out.outputs[0].policy_logprobs for out in outs}) == 1
    assert [out.prompt for out in outs] == ["the end", "the end", None]
    for wrong in ({"prompt": [1]}, {"messages": "hi"}, {"prompt_token_ids": "hi"}, {"prompt": "a", "messages": []}, {}):
        with pytest.raises(ValueError, match="prompt_token_ids"):
            text_llm.generate(wrong, PARAMS)
    with pytest.raises(ValueError, match="the tokenizer refuses"):
        text_llm.generate("half a pair: \ud83d", PARAMS)


def test_chat_renders_the_template_with_one_bos(text_llm: LLM) -> None:
    ids = text_llm.tokenizer.encode("<s>[user]the end[kind]", add_special_tokens=False)
    assert ids.count(text_llm.tokenizer.bos_token_id) == 1
    single = text_llm.chat(MESSAGES, PARAMS, tone="kind")
    several = text_llm.chat([MESSAGES, MESSAGES], PARAMS, tone="kind")
    assert [list(out.prompt_token_ids) for out in (*single, *several)] == [ids] * 3
    (plain,) = text_llm.generate({"messages": MESSAGES}, PARAMS)  # no template arguments
    assert text_llm.tokenizer.decode(plain.prompt_token_ids) == "<s>[user]the end[]"
    (other,) = text_llm.chat(MESSAGES, PARAMS, chat_template="{{ messages[0].content }}!")
    assert text_llm.tokenizer.decode(other.prompt_token_ids) == "the end!"
    with pytest.raises(ValueError, match="refuses the messages"):
        text_llm.chat(MESSAGES, PARAMS, chat_template="{{ nothing.there.either }}")


def test_chat_needs_a_tokenizer(llm: LLM) -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        llm.chat(MESSAGES)


# ---------------------------------------------------------------- the shortest answer


@pytest.mark.parametrize("elements", [runner.SAMPLER_ELEMENTS, 1])
def test_min_tokens_keeps_stopping_ids_out_and_reports_what_was_sampled(
    elements: int,
    model: Model,
    make_llm: MakeLLM,
    compare: Compare,
    prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A third of the vocabulary stops the answer. Judged by the distribution of one packed float64 forward. Also where
    the sampler takes the rows in parts, the first of them without bans."""
    monkeypatch.setattr(runner, "SAMPLER_ELEMENTS", elements)
    stops = list(range(0, 131, 3))
    setting = {"n": 8, "max_tokens": 12, "stop_token_ids": stops[1:], "seed": 5, "top_p": 0.9, "min_p": 0.01}
    prompts = [prompt(5, 1), prompt(40, 2)]
    params = [SamplingParams(**setting), SamplingParams(min_tokens=6, **setting)]
    free, held = make_llm().generate(prompts, params)
    assert min(len(a.token_ids) for a in free.outputs) < 6  # there is something to hold back
    lengths = [len(a.token_ids) for a in held.outputs]
    assert min(lengths) == 7 and all(not set(a.token_ids[:6]) & set(stops) for a in held.outputs)
    assert compare(model.decoder, [held, free]).gap == 0.0  # over the full vocabulary, bans or not
    for answer in held.outputs:
        ids = torch.tensor([*held.prompt_token_ids, *answer.token_ids])
        with torch.no_grad():
            hidden = model.decoder.hidden(ids, PackedAttention.from_lengths([len(ids)]))
            z = model.decoder.head.logits(hidden)[len(held.prompt_token_ids) - 1 : -1].double()
        for at, token in enumerate(answer.token_ids):
            full = torch.softmax(z[at], -1)
            p = full.clone()
            p[stops if at < 6 else []] = 0
            p /= p.sum()
            p[p < 0.01 * p.max()] = 0
            order = p.argsort(descending=True)
            p[order[(p[order].cumsum(0) - p[order]) >= 0.9 * p.sum()]] = 0
            assert abs(answer.processed_logprobs[at] - (p[token] / p.sum()).log().item()) < 1e-5
            assert abs(answer.log_kept_mass[at] - full[p > 0].sum().log().item()) < 1e-5
            assert abs(answer.entropies[at] - torch.special.entr(full).sum().item()) < 1e-5


def test_min_tokens_where_nothing_stops(make_llm: MakeLLM) -> None:
    (answer,) = make_llm().generate([[3, 4]], SamplingParams(min_tokens=3, max_tokens=4, ignore_eos=True))[0].outputs
    assert len(answer.token_ids) == 4


def test_greedy_decoding_honours_min_tokens(model: Model, make_llm: MakeLLM) -> None:
    params = {"temperature": 0, "max_tokens": 10}
    free = make_llm().generate([[3, 4]], SamplingParams(ignore_eos=True, **params))[0].outputs[0].token_ids
    llm = make_llm(model=Model(model.decoder, model.hf_config, None, tuple(free[:2])))
    for least in (0, 1, 5, 10):
        (answer,) = llm.generate([[3, 4]], SamplingParams(min_tokens=least, **params))[0].outputs
        assert len(answer.token_ids) >= max(1, least)
        assert not set(answer.token_ids[:least]) & set(free[:2])
        assert (answer.token_ids[0] == free[0]) == (least == 0)
        assert set(answer.processed_logprobs) == {0.0}


@pytest.mark.parametrize("field", ({"min_p": -0.1}, {"min_p": 1.1}, {"min_tokens": -1}, {"min_tokens": 17}), ids=str)
def test_bad_new_params(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(ValueError, match=f"{name}=.*must be"):
        SamplingParams(**field)
