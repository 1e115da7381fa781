"""Shared pages hold what the request would have computed itself, under the weights of now; and were they
wrong, the comparison would say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from rollout_engine import LLM, SamplingParams
from rollout_engine.block_manager import ROOT, BlockManager
from rollout_engine.models.checkpoint import Model
from rollout_engine.scheduler import Scheduler

MakeLLM = Callable[..., LLM]
Compare = Callable[..., Any]
Prompt = Callable[[int, int], list[int]]
PARAMS = SamplingParams(n=2, max_tokens=10, ignore_eos=True)


def perturb(model: Model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def policy(llm: LLM, prompts: list[list[int]]) -> list[tuple[float, ...]]:
    """All log-probs of answers whose noise has the same names on every engine."""
    names = [[10 * i, 10 * i + 1] for i in range(len(prompts))]
    return [a.policy_logprobs for out in llm.generate(prompts, PARAMS, sample_ids=names) for a in out.outputs]


# ---------------------------------------------------------------- hits


@pytest.mark.parametrize(("page_size", "hit"), ((32, 64), (64, 64), (96, 0)))
def test_equal_prompts_of_one_step_share(page_size: int, hit: int, make_llm: MakeLLM, prompt: Prompt) -> None:
    llm = make_llm(page_size=page_size, pages=48, max_batch_tokens=512)
    for _ in range(5):
        llm.add_request(prompt(70, 0), PARAMS)
    llm.step()
    llm.check_integrity()
    stats = llm.stats()
    assert (stats.cached, stats.forwarded, stats.sampled) == (4 * hit, 70 + 4 * (70 - hit), 10)
    finished = []
    while llm.scheduler.has_work:
        finished += llm.step()
        llm.check_integrity()
    assert [out.num_cached_tokens for out in finished] == [0, hit, hit, hit, hit]
    assert llm.stats().free_pages == 48


def test_sharing_changes_no_answer(make_llm: MakeLLM, prompt: Prompt) -> None:
    head = prompt(64, 0)
    prompts = [[*head, 1], [*head, 1], prompt(70, 1), head + [2] * 40, prompt(70, 1), head, head[:33]]
    off = make_llm(prefix_caching=False)
    expected = policy(off, prompts)
    assert off.stats().cached == 0
    for engine in ({}, {"max_batch_tokens": 40}, {"pages": 9}):
        on = make_llm(**engine)
        assert policy(on, prompts) == expected
        assert on.stats().cached >= 5 * 32
        assert policy(on, prompts) == expected  # now from a warm cache


def test_pages_that_decoding_filled_are_hit(model: Model, make_llm: MakeLLM, compare: Compare, prompt: Prompt) -> None:
    llm = make_llm()
    params = SamplingParams(n=1, max_tokens=40, ignore_eos=True)
    (first,) = llm.generate([prompt(40, 0)], params)
    second = llm.generate([[*first.prompt_token_ids, *first.outputs[0].token_ids, 5, 6]], params)
    assert second[0].num_cached_tokens == 64  # 79 tokens were computed: the 80th was only sampled
    assert compare(model.decoder, second) == (0.0, 40)


def test_a_prompt_of_whole_pages_still_forwards_its_last_token(
    model: Model, make_llm: MakeLLM, compare: Compare, prompt: Prompt
) -> None:
    llm = make_llm()
    outputs = [llm.generate([prompt(64, 0)], PARAMS)[0] for _ in range(2)]
    assert [out.num_cached_tokens for out in outputs] == [0, 32]
    assert compare(model.decoder, outputs) == (0.0, 40)


# ---------------------------------------------------------------- versions


def test_new_weights_hit_no_old_page(model: Model, make_llm: MakeLLM, prompt: Prompt) -> None:
    llm = make_llm()
    prompts = [prompt(70, 0), prompt(70, 0)[:40], prompt(33, 1)]
    old = policy(llm, prompts)
    assert policy(llm, prompts) == old
    cached = llm.stats().cached
    assert cached == 32 + (64 + 32 + 32)
    perturb(model)
    llm.publish(1)
    new = policy(llm, prompts)
    assert llm.stats().cached == cached + 32  # the second prompt's from the first, of the same step
    assert new == policy(make_llm(), prompts)
    assert not {*new} & {*old}
    assert policy(llm, prompts) == new
    assert llm.stats().cached == cached + 32 + (64 + 32 + 32)


# ---------------------------------------------------------------- mutations


def scenario(model: Model, make_llm: MakeLLM, compare: Compare, prompt: Prompt) -> tuple[dict[str, float], int]:
    """All that pages are shared for, before, across and after a swap: largest gap to the trainer in each; hits."""
    llm = make_llm(pages=18, max_batch_tokens=512)
    x, y, same, other = (prompt(32, seed) for seed in range(4))
    # The third shares its first page with the second, and its second page has the first's tokens after other ones.
    prompts = [[*x, *same, 1], [*y, *other, 2], [*y, *same, 3]]

    def ask(asked: Sequence[list[int]]) -> float:
        outputs = llm.generate(asked, PARAMS)
        llm.check_integrity()
        result = compare(model.decoder, outputs)
        assert result.tokens == 2 * 10 * len(asked)
        return result.gap

    gaps = {"one step": ask(prompts)}
    gaps["reuse"] = ask([prompt(90, seed) for seed in range(10, 15)])  # these take the pages of the prompts
    gaps["again"] = ask(prompts)
    llm.add_request(prompts[0], PARAMS)
    for _ in range(4):
        llm.step()
    perturb(model)
    llm.publish(1)
    (finished,) = [out for _ in range(6) for out in llm.step()]
    gaps["across"] = compare(model.decoder, [finished], version=llm.weight_version).gap
    gaps["after"] = ask(prompts)
    return gaps, llm.stats().cached


def test_scenario_is_exact(model: Model, make_llm: MakeLLM, compare: Compare, prompt: Prompt) -> None:
    gaps, cached = scenario(model, make_llm, compare, prompt)
    assert cached == 32 * (1 + 1 + 2 + 3)  # pages hit in one step, again, by the later request, after
    assert gaps == dict.fromkeys(("one step", "reuse", "again", "across", "after"), 0.0)


def no_version_bump(patch: pytest.MonkeyPatch) -> None:
    def publish(llm: LLM, version: int) -> None:
        llm.scheduler.preempt_all()

    patch.setattr(LLM, "publish", publish)


def key_without_version(patch: pytest.MonkeyPatch) -> None:
    key = BlockManager.key
    patch.setattr(BlockManager, "key", lambda self, parent, ids, version: key(self, parent, ids, 0))


def key_without_parent(patch: pytest.MonkeyPatch) -> None:
    key = BlockManager.key
    patch.setattr(BlockManager, "key", lambda self, parent, ids, version: key(self, ROOT, ids, version))


def key_of_a_few_tokens(patch: pytest.MonkeyPatch) -> None:
    key = BlockManager.key
    patch.setattr(BlockManager, "key", lambda self, parent, ids, version: key(self, parent, ids[:0], version))


def another_prompts_pages(patch: pytest.MonkeyPatch) -> None:
    def match(self: BlockManager, token_ids: Sequence[int], version: int) -> tuple[list[int], list[bytes]]:
        found = list(self._page_of.items())[: len(token_ids) // self.page_size]
        return [page for _, page in found], [key for key, _ in found]

    patch.setattr(BlockManager, "match", match)


def no_copy_on_write(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "is_shared", lambda self, page: False)


def copies_not_made(patch: pytest.MonkeyPatch) -> None:
    reserve = Scheduler._reserve

    def forgetful(self: Scheduler, seq: Any, end: int, step: Any) -> bool:
        done = reserve(self, seq, end, step)
        step.copies.clear()
        return done

    patch.setattr(Scheduler, "_reserve", forgetful)


def pages_kept_over_the_swap(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "preempt_all", lambda self: None)


def reused_page_still_cached(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "_forget", lambda self, page: None)


def fork_without_a_reference(patch: pytest.MonkeyPatch) -> None:
    share = BlockManager.share

    def lazy(self: BlockManager, pages: list[int]) -> None:
        share(self, [page for page in pages if self._refs[page] == 0])

    patch.setattr(BlockManager, "share", lazy)


MUTATIONS = (
    (no_version_bump, "after"),
    (key_without_version, "after"),
    (key_without_parent, "one step"),
    (key_of_a_few_tokens, "one step"),
    (another_prompts_pages, "one step"),
    (no_copy_on_write, "one step"),
    (copies_not_made, "one step"),
    (pages_kept_over_the_swap, "across"),
    (reused_page_still_cached, "again"),
)


@pytest.mark.parametrize(("mutate", "phase"), MUTATIONS, ids=[mutate.__name__ for mutate, _ in MUTATIONS])
def test_mutation_shows_in_the_log_probs(
    mutate: Callable[[pytest.MonkeyPatch], None],
    phase: str,
    model: Model,
    make_llm: MakeLLM,
    compare: Compare,
    prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutate(monkeypatch)
    gaps, _ = scenario(model, make_llm, compare, prompt)
    assert gaps[phase] > 1e-4


def test_lost_reference_shows_in_the_integrity_check(
    make_llm: MakeLLM, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_without_a_reference(monkeypatch)
    llm = make_llm()
    llm.add_request(prompt(70, 0), PARAMS)
    llm.step()
    with pytest.raises(AssertionError, match="page 0: 1 references, 2 uses"):
        llm.check_integrity()


def test_failed_forward_whose_cache_survived_shows(
    model: Model, make_llm: MakeLLM, compare: Compare, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = []
    for mutated in (False, True):
        llm = make_llm()

        def fail(step: Any) -> None:
            raise RuntimeError("lost")

        with monkeypatch.context() as patch:
            patch.setattr(llm.runner, "run", fail)
            if mutated:
                patch.setattr(llm.scheduler.blocks, "reset_prefix_cache", lambda: None)
            with pytest.raises(RuntimeError, match="lost"):
                llm.generate([prompt(70, 0)], PARAMS)
        gaps.append(compare(model.decoder, llm.generate([prompt(70, 0)], PARAMS)).gap)
    assert gaps[0] == 0.0
    assert gaps[1] > 1e-4
