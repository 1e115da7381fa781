"""Stop strings against the naive cut of the whole text, for tokenizers that split characters in every way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rollout_engine import LLM, SamplingParams
from rollout_engine.detokenizer import Detokenizer
from rollout_engine.models.checkpoint import Model

TEXT = st.text(alphabet="the ndST\nOPé你好🙂-,.", max_size=30)
BROKEN = st.lists(st.integers(0, 299), max_size=12)  # any ids: bytes that are no characters


@pytest.fixture(scope="session")
def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words with a leading mark, single bytes for the rest, the text's first space dropped."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁the", "the", "▁end", "S", "T", "O", "P", ",", "é"]
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>")


def watch(tokenizer: Any, answer: Sequence[int], params: SamplingParams) -> tuple[int, str | None, str]:
    """Tokens until the engine would stop, the stop string, and the text, as the engine goes about it."""
    detokenizer = Detokenizer(tokenizer)
    prompt = [1, 2, 3]
    for count in range(1, len(answer) + 1):
        stop = detokenizer.stop_string([*prompt, *answer[:count]], len(prompt), params)
        if stop is not None:
            text, again = detokenizer.text(answer[:count], params)
            assert again == stop
            return count, stop, text
    text, stop = detokenizer.text(answer, params)
    assert stop is None
    return len(answer), None, text


def naive(tokenizer: Any, answer: Sequence[int], params: SamplingParams) -> tuple[int, str | None, str]:
    """The same from the whole text after every token."""
    decode = tokenizer.decode
    text = ""
    for count in range(1, len(answer) + 1):
        text = decode(answer[:count], skip_special_tokens=params.skip_special_tokens)
        settled = len(decode(answer[: params.min_tokens], skip_special_tokens=params.skip_special_tokens))
        hits = [
            (at, place, stop)
            for place, stop in enumerate(params.stop_strings)
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > (settled if params.min_tokens else 0)
        ]
        if hits and count > params.min_tokens:
            at, _, stop = min(hits)
            return count, stop, text[: at + (len(stop) if params.include_stop_str_in_output else 0)]
    return len(answer), None, text


@given(data=st.data(), tokenizer_name=st.sampled_from(["byte_tokenizer", "fallback_tokenizer"]))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_text_ends_at_the_first_stop_string(
    data: st.DataObject,
    tokenizer_name: str,
    byte_tokenizer: PreTrainedTokenizerFast,
    fallback_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = {"byte_tokenizer": byte_tokenizer, "fallback_tokenizer": fallback_tokenizer}[tokenizer_name]
    special = st.sampled_from(tokenizer.all_special_ids)
    pieces = st.one_of(TEXT.map(lambda text: tokenizer.encode(text)), BROKEN, st.lists(special, max_size=12))
    answer = [t for piece in data.draw(st.lists(pieces, max_size=8)) for t in piece if t < len(tokenizer)]
    assume(answer)
    skip = data.draw(st.booleans())
    text = tokenizer.decode(answer, skip_special_tokens=skip)
    inside = st.tuples(st.integers(0, len(text)), st.integers(1, 4)).map(lambda cut: text[cut[0] : sum(cut)])
    stop = data.draw(st.lists(st.one_of(inside, TEXT).filter(bool), min_size=1, max_size=3))
    params = SamplingParams(
        stop=stop,
        skip_special_tokens=skip,
        include_stop_str_in_output=data.draw(st.booleans()),
        max_tokens=len(answer),
        min_tokens=data.draw(st.one_of(st.just(0), st.integers(0, len(answer)))),
    )
    found = watch(tokenizer, answer, params)
    assert found == naive(tokenizer, answer, params)
    if not params.min_tokens:
        cut = found[2].removesuffix(found[1]) if found[1] and params.include_stop_str_in_output else found[2]
        assert not any(text in cut for text in stop)
    if found[1] and not params.include_stop_str_in_output and tokenizer is byte_tokenizer:
        assert text.startswith(found[2])


def test_a_stop_string_across_token_borders_and_characters_is_found_at_its_last_byte(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    byte_of = {byte: byte_tokenizer.convert_tokens_to_ids(mark) for mark, byte in byte_marks().items()}
    answer = [byte_of[byte] for byte in "a🙂b".encode()]
    assert watch(byte_tokenizer, answer, SamplingParams(stop="🙂")) == (5, "🙂", "a")
    assert watch(byte_tokenizer, answer, SamplingParams(stop="🙂", include_stop_str_in_output=True))[2] == "a🙂"
    assert watch(byte_tokenizer, answer, SamplingParams(stop=["🙂b", "b"])) == (6, "🙂b", "a")
    assert watch(byte_tokenizer, answer, SamplingParams(stop=["b", "🙂b"]))[1] == "🙂b"  # the first in the text
    assert watch(byte_tokenizer, answer, SamplingParams(stop=["a", "a🙂"]))[1] == "a"


def test_a_stop_string_is_found_wherever_the_window_cuts_a_run_of_byte_tokens(
    fallback_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """This decoder shows a whole run as broken when it begins within a character."""
    text = "你好吗我很好谢谢你呢再见朋友"
    answer = list(text.encode())  # a byte is its own token id
    for at in range(len(text)):
        for stop in (text[at], text[at : at + 3]):
            count = len(text[: text.index(stop)].encode()) + len(stop.encode())
            assert watch(fallback_tokenizer, answer, SamplingParams(stop=stop))[:2] == (count, stop)


def test_special_tokens_inside_a_stop_string_do_not_hide_it(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    left, right = byte_tokenizer.encode("day EN"), byte_tokenizer.encode("D and on")
    answer = [*left, *[byte_tokenizer.bos_token_id] * 50, *right]
    assert watch(byte_tokenizer, answer, SamplingParams(stop="END"))[1:] == ("END", "day ")
    shown = SamplingParams(stop="END", skip_special_tokens=False)
    assert watch(byte_tokenizer, answer, shown)[1] is None


def test_a_space_at_the_windows_edge_counts(fallback_tokenizer: PreTrainedTokenizerFast) -> None:
    """This decoder drops the first space of what it is given."""
    ids = fallback_tokenizer.convert_tokens_to_ids(["S", "T", "O", "P", "S", "T", "▁", "O", "P"])
    assert watch(fallback_tokenizer, ids, SamplingParams(stop=" O")) == (8, " O", "STOPST")


def byte_marks() -> dict[str, int]:
    """How byte-level BPE writes the 256 bytes (as in GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


# ---------------------------------------------------------------- in the engine


class Counting:
    """A tokenizer that notes how many tokens each decode is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.decoded: list[int] = []

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        self.decoded.append(len(ids))
        return self._tokenizer.decode(ids, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_work_per_token_is_bounded_and_nothing_without_stop_strings(text_model: Model) -> None:
    counting = Counting(text_model.tokenizer)
    llm = LLM(Model(text_model.decoder, text_model.hf_config, counting, text_model.eos_ids), kv_cache_gib=0.01)
    prompt, params = [[5, 6]], {"max_tokens": 200, "ignore_eos": True, "seed": 2}
    llm.generate(prompt, SamplingParams(n=3, **params))
    assert counting.decoded == [200] * 3  # the finished answers
    counting.decoded.clear()
    llm.generate(prompt, SamplingParams(stop=["nowhere to be found"], **params))
    assert counting.decoded[-1] == 200 and max(counting.decoded[:-1]) <= len("nowhere to be found") + 8
    assert 200 < len(counting.decoded) <= 1 + 4 * 200


def test_answers_are_those_without_stop_strings_up_to_the_first(text_model: Model) -> None:
    llm = LLM(text_model, kv_cache_gib=0.01)
    params = {"n": 6, "max_tokens": 40, "ignore_eos": True, "seed": 1}
    free = llm.generate(["the end"], SamplingParams(**params))[0].outputs
    stops = [free[1].text[5:7], free[4].text[11:14]]
    for include in (False, True):
        setting = SamplingParams(stop=stops, include_stop_str_in_output=include, **params)
        stopped = llm.generate(["the end"], setting)[0].outputs
        for answer, whole in zip(stopped, free, strict=True):
            count, stop, text = naive(text_model.tokenizer, whole.token_ids, setting)
            assert (answer.text, answer.stop_reason) == (text, stop)
            assert answer.finish_reason == ("stop" if stop else "length")
            assert answer.token_ids == whole.token_ids[:count]
            assert answer.policy_logprobs == whole.policy_logprobs[:count]
        assert {answer.finish_reason for answer in stopped} >= {"stop"}
        assert stopped[1].stop_reason and stopped[4].stop_reason
    assert llm.stats().free_pages == llm.stats().total_pages


def test_a_stop_string_comes_before_the_length_and_beside_a_stop_token(text_model: Model) -> None:
    llm = LLM(text_model, kv_cache_gib=0.01)
    params = {"max_tokens": 12, "ignore_eos": True}
    answers = llm.generate(["x"], SamplingParams(n=16, seed=3, **params))[0].outputs
    whole = next(answer for answer in answers if answer.text[-1] not in answer.text[:-1] + "\N{REPLACEMENT CHARACTER}")
    stop, params = whole.text[-1], {**params, "n": 1 + whole.index, "seed": 3}
    for ids in ([], [whole.token_ids[-1]]):
        answer = llm.generate(["x"], SamplingParams(stop=stop, stop_token_ids=ids, **params))[0].outputs[-1]
        assert (answer.finish_reason, answer.stop_reason, answer.text) == ("stop", stop, whole.text[:-1])


def test_special_tokens_are_shown_on_request(text_model: Model) -> None:
    eos = text_model.eos_ids[0]
    llm = LLM(text_model, kv_cache_gib=0.01)
    params = {"max_tokens": 60, "n": 32, "seed": 0}
    hidden = llm.generate(["x"], SamplingParams(**params))[0].outputs
    shown = llm.generate(["x"], SamplingParams(skip_special_tokens=False, **params))[0].outputs
    ended = [answer for answer in shown if answer.token_ids[-1] == eos]
    assert ended and all(answer.text.endswith("</s>") for answer in ended)
    assert not any("</s>" in answer.text for answer in hidden)


@pytest.mark.parametrize("stop", ("", [""], ["a", ""], [3]), ids=repr)
def test_stop_strings_that_are_none_are_refused(stop: Any) -> None:
    with pytest.raises(ValueError, match=r"stop=.*must be text"):
        SamplingParams(stop=stop)


def test_stop_strings_need_a_tokenizer(text_model: Model) -> None:
    llm = LLM(Model(text_model.decoder, text_model.hf_config, None, ()), kv_cache_gib=0.01)
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        llm.generate([[1]], SamplingParams(stop="x"))
