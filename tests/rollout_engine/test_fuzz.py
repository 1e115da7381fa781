"""Random operations on the engine over a model whose KV is a hash of what it must hold, and on the pages alone."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from rollout_engine import LLM, RequestOutput, SamplingParams
from rollout_engine.block_manager import ROOT, BlockManager
from rollout_engine.models.checkpoint import Model
from rollout_engine.scheduler import Schedule, Scheduler

OPERATIONS, SLOW_OPERATIONS = 10_000, 100_000
PER_ENGINE = 500
VOCAB, EOS = 6, 0


def prefix_hashes(token_ids: list[int], version: int) -> list[int]:
    """What the KV at each position depends on: the weights and all tokens up to there."""
    hashes, state = [], hash((version,))
    for token in token_ids:
        state = hash((state, token))
        hashes.append(state)
    return hashes


def next_token(token_ids: list[int], version: int, sample_id: int) -> int:
    return hash((prefix_hashes(token_ids, version)[-1], sample_id)) % VOCAB


class HashModel:
    """Stands in for the runner: every slot of every page remembers which prefix and version it was written for."""

    def __init__(self, scheduler: Scheduler) -> None:
        blocks = scheduler.blocks
        self.scheduler = scheduler
        self.size = blocks.page_size
        self.pages: list[list[int | None]] = [[None] * self.size for _ in range(blocks.num_pages)]
        self.fail_next = False

    def run(self, step: Schedule) -> SimpleNamespace | None:
        if self.fail_next:
            self.fail_next = False
            raise MemoryError("as asked")
        assert 0 < sum(chunk.end - chunk.start for chunk in step.chunks) <= self.scheduler.max_batch_tokens
        copied = [(target, list(self.pages[source])) for source, target in step.copies]
        for target, content in copied:
            self.pages[target] = content
        version = self.scheduler.version
        wanted = [prefix_hashes(chunk.seq.token_ids[: chunk.end], version) for chunk in step.chunks]
        for chunk, hashes in zip(step.chunks, wanted, strict=True):
            assert chunk.start == chunk.seq.num_computed < chunk.end
            for at in range(chunk.start, chunk.end):
                self.pages[chunk.seq.pages[at // self.size]][at % self.size] = hashes[at]
        for chunk, hashes in zip(step.chunks, wanted, strict=True):
            held = [slot for page in chunk.seq.pages for slot in self.pages[page]][: chunk.end]
            assert held == hashes, f"request {chunk.seq.group.request_id} attends to KV that is not its own"
        tokens = []
        for chunk in step.chunks:
            for index in range(chunk.seq.index, chunk.seq.index + chunk.samples):
                tokens.append(next_token(chunk.seq.token_ids, version, chunk.seq.group.sample_ids[index]))
        if not tokens:
            return None
        logprobs = array("d", [-1.0 - token for token in tokens])
        return SimpleNamespace(a=array("q", tokens), b=logprobs, c=logprobs, d=logprobs, e=logprobs)


class Fuzz:
    """An engine over :class:`HashModel`, and what was asked of it and not yet answered."""

    def __init__(self, model: Model, seed: int, *, lossless: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.llm = LLM(Model(model.decoder, model.hf_config, None, (EOS,)), kv_cache_gib=0.01, numerics="fast")
        page_size = rng.choice((1, 3, 4, 5))
        blocks = BlockManager(60 if page_size == 1 else rng.randrange(14, 40), page_size)
        self.llm.scheduler = Scheduler(
            blocks,
            max_num_seqs=rng.randrange(4, 13),
            max_batch_tokens=rng.choice((3, 7, 13, 30, 90)),
            prefix_caching=rng.random() < 0.8,
            stats=self.llm.counters,
        )
        self.model = HashModel(self.llm.scheduler)
        self.llm.runner = self.model  # type: ignore[assignment]
        self.longest = min(blocks.num_pages * blocks.page_size, 60)
        self.heads = [self.tokens(rng.randrange(4, self.longest // 2)) for _ in range(3)]
        self.live: dict[int, tuple[list[int], SamplingParams]] = {}
        self.ended: Counter[str] = Counter()
        self.required = 0  # tokens that had to be forwarded or found in the cache
        self.operations: list[tuple[int, Callable[[], None]]] = [
            (6, self.add),
            (30, self.step),
            (1, self.publish),
            (1, self.llm.reset_prefix_cache),
            (1, self.llm.scheduler.preempt_all),
            (2, self.preempt_youngest),
        ]
        if not lossless:
            self.operations += [(2, self.abort), (0.2, self.fail)]

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(1, VOCAB) for _ in range(count)]

    def run(self, operations: int) -> None:
        weights, choices = zip(*self.operations, strict=True)
        for operation in self.rng.choices(choices, weights, k=operations):
            operation()
            self.check()
        while self.llm.scheduler.has_work:
            self.step()
            self.check()
        assert not self.live
        assert sum(self.ended.values()) == self.ended["added"] * 2
        assert self.ended["finished"] == self.llm.counters.finished_requests
        assert self.ended["aborted"] == self.llm.counters.aborted_requests
        assert self.llm.stats().free_pages == self.llm.scheduler.blocks.num_pages

    def check(self) -> None:
        self.llm.check_integrity()
        assert {seq.group.request_id for seq in self.llm.scheduler.sequences()} == set(self.live)

    def add(self) -> None:
        if len(self.live) >= 10:
            return
        rng = self.rng
        head = rng.choice(self.heads)
        prompt = head[: rng.randrange(len(head) + 1)] + self.tokens(rng.randrange(1, 10))
        params = SamplingParams(
            n=rng.randrange(1, 5),
            max_tokens=rng.randint(1, self.longest - len(prompt)) if rng.random() < 0.7 else 1,
            ignore_eos=rng.random() < 0.4,
        )
        self.live[self.llm.add_request(prompt, params)] = prompt, params
        self.ended["added"] += 1

    def step(self) -> None:
        before, had_work = self.llm.counters.forwarded, self.llm.scheduler.has_work
        finished = self.llm.step()
        assert (self.llm.counters.forwarded > before) == had_work
        for out in finished:
            self.answered(out, "finished")

    def abort(self) -> None:
        if self.live:
            self.answered(self.llm.abort(self.rng.choice(sorted(self.live))), "aborted")

    def publish(self) -> None:
        self.llm.publish(self.llm.weight_version + self.rng.randrange(1, 3))

    def preempt_youngest(self) -> None:
        if self.llm.scheduler.running:
            self.llm.scheduler.preempt(self.llm.scheduler.running.pop())

    def fail(self) -> None:
        if self.llm.scheduler.has_work:
            self.model.fail_next = True
            with pytest.raises(MemoryError):
                self.llm.step()
            self.ended["dropped"] += len(self.live)
            self.live.clear()

    def answered(self, out: RequestOutput, how: str) -> None:
        """Each request ends once, and each of its tokens is what the model says after the ones before."""
        prompt, params = self.live.pop(out.request_id)
        self.ended[how] += 1
        assert list(out.prompt_token_ids) == prompt
        assert [answer.index for answer in out.outputs] == list(range(params.n))
        reasons = {answer.finish_reason for answer in out.outputs}
        assert ("abort" in reasons) if how == "aborted" else reasons <= {"stop", "length"}
        self.required += len(prompt)
        for answer in out.outputs:
            token_ids = list(prompt)
            for token, version in zip(answer.token_ids, answer.weight_versions, strict=True):
                assert token == next_token(token_ids, version, answer.sample_id)
                token_ids.append(token)
            assert answer.policy_logprobs == tuple(-1.0 - token for token in answer.token_ids)
            self.required += len(answer.token_ids) - 1
            stops = [token == EOS and not params.ignore_eos for token in answer.token_ids]
            assert not any(stops[:-1])
            expected = "stop" if stops and stops[-1] else "length"
            if expected == "stop" or len(stops) == params.max_tokens:
                assert answer.finish_reason == expected
            else:
                assert answer.finish_reason == "abort"


def fuzz(model: Model, operations: int) -> Counter[str]:
    total: Counter[str] = Counter()
    for seed in range(operations // PER_ENGINE):
        run = Fuzz(model, seed)
        run.run(PER_ENGINE)
        total += run.ended + Counter(preempted=run.llm.counters.preemptions, cached=run.llm.counters.cached)
    return total


def test_random_operations(model: Model) -> None:
    total = fuzz(model, OPERATIONS)
    for what, at_least in {"finished": 500, "aborted": 100, "dropped": 20, "preempted": 1000, "cached": 1000}.items():
        assert total[what] > at_least, total


@pytest.mark.slow
def test_many_random_operations(model: Model) -> None:
    assert fuzz(model, SLOW_OPERATIONS)["finished"] > 5000


@pytest.mark.parametrize("seed", range(8))
def test_every_token_is_accounted_for(model: Model, seed: int) -> None:
    run = Fuzz(model, seed, lossless=True)
    run.run(3 * PER_ENGINE)
    stats = run.llm.stats()
    assert stats.recomputed > 0
    assert stats.forwarded - stats.recomputed == run.required - stats.cached
    assert run.ended["finished"] == run.ended["added"] > 30


# ---------------------------------------------------------------- the fuzz can fail


def no_copy_on_write(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "is_shared", lambda self, page: False)


def key_without_version(patch: pytest.MonkeyPatch) -> None:
    key = BlockManager.key
    patch.setattr(BlockManager, "key", lambda self, parent, ids, version: key(self, parent, ids, 0))


def key_without_parent(patch: pytest.MonkeyPatch) -> None:
    key = BlockManager.key
    patch.setattr(BlockManager, "key", lambda self, parent, ids, version: key(self, ROOT, ids, version))


def reused_page_still_cached(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "_forget", lambda self, page: None)


def cache_survives_a_failure(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "reset_prefix_cache", lambda self: None)


def preempted_and_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "preempt", lambda self, seq: self._give_up_pages(seq))


def pages_kept_over_the_swap(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LLM, "publish", lambda self, version: setattr(self.scheduler, "version", version))


def pages_never_given_back(patch: pytest.MonkeyPatch) -> None:
    def remove(self: Scheduler, finished: set[Any]) -> None:
        self.running = [seq for seq in self.running if seq not in finished]
        self.waiting = type(self.waiting)(seq for seq in self.waiting if seq not in finished)

    patch.setattr(Scheduler, "remove", remove)


MUTATIONS = (
    no_copy_on_write,
    key_without_version,
    key_without_parent,
    reused_page_still_cached,
    cache_survives_a_failure,
    preempted_and_lost,
    pages_kept_over_the_swap,
    pages_never_given_back,
)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_fuzz_notices(
    mutate: Callable[[pytest.MonkeyPatch], None], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        fuzz(model, OPERATIONS)


# ---------------------------------------------------------------- pages alone, against lists and dicts

CHUNK = st.sampled_from(((0, 0), (0, 1)))
PICK = st.integers(0, 99)
PAGES = 5


class Pages(RuleBasedStateMachine):
    """A table is (version, [(page, its two tokens), ...]); the model's keys are whole prefixes and it scans lists."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(PAGES, 2)
        self.free = list(range(PAGES))
        self.cache: dict[tuple[Any, ...], int] = {}
        self.tables: list[tuple[int, list[tuple[int, tuple[int, int]]]]] = []
        self.known: list[tuple[Any, ...]] = [(0,)]  # prefixes registered at some time

    def uses(self, page: int) -> int:
        return sum(page == used for _, table in self.tables for used, _ in table)

    @rule(chunks=st.lists(CHUNK, min_size=1, max_size=3), version=st.integers(0, 1), register=st.booleans())
    def allocate(self, chunks: list[tuple[int, int]], version: int, register: bool) -> None:
        table = []
        for chunk in chunks[: len(self.free)]:
            page = self.blocks.allocate()
            assert page == self.free.pop(0)
            self.cache = {key: cached for key, cached in self.cache.items() if cached != page}
            table.append((page, chunk))
        if table:
            self.tables.append((version, table))
            if register:
                self.register(len(self.tables) - 1, len(table) - 1)

    def own(self, version: int, entries: list[tuple[int, tuple[int, int]]]) -> None:
        self.blocks.share([page for page, _ in entries])
        self.tables.append((version, list(entries)))
        self.free = [page for page in self.free if not self.uses(page)]

    @precondition(lambda self: self.tables)
    @rule(pick=PICK)
    def share(self, pick: int) -> None:
        self.own(*self.tables[pick % len(self.tables)])

    @precondition(lambda self: self.tables)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        _, table = self.tables.pop(pick % len(self.tables))
        self.blocks.release([page for page, _ in table])
        self.free += [page for page, _ in table[::-1] if not self.uses(page)]

    @precondition(lambda self: self.tables)
    @rule(pick=PICK, end=PICK)
    def fill(self, pick: int, end: int) -> None:
        self.register(pick, end)

    def register(self, pick: int, end: int) -> None:
        version, table = self.tables[pick % len(self.tables)]
        key, prefix = ROOT, (version,)
        for page, chunk in table[: end % len(table) + 1]:
            key, prefix = self.blocks.key(key, chunk, version), (*prefix, chunk)
            self.blocks.register(page, key)
            if prefix not in self.cache and page not in self.cache.values():
                self.cache[prefix] = page
        self.known.append(prefix)

    @rule(pick=PICK, other=CHUNK, version=st.integers(0, 1), odd=st.booleans())
    def match(self, pick: int, other: tuple[int, int], version: int, odd: bool) -> None:
        """Something that was registered once, and likely one page of it replaced."""
        chunks = [*self.known[pick % len(self.known)][1:], other]
        chunks[pick % 7 % len(chunks)] = other
        pages, keys = self.blocks.match([token for chunk in chunks for token in chunk] + [1] * odd, version)
        found = [self.cache.get((version, *chunks[: i + 1])) for i in range(len(chunks))]
        expected = found[: found.index(None)] if None in found else found
        assert pages == expected
        assert len(keys) == len(pages)
        if pages:
            self.own(version, list(zip(pages, chunks, strict=False)))

    @rule()
    def reset(self) -> None:
        self.blocks.reset_prefix_cache()
        self.cache.clear()

    @invariant()
    def counts_agree(self) -> None:
        self.blocks.check_integrity([page for page, _ in table] for _, table in self.tables)
        assert self.blocks.num_free == len(self.free)
        assert [self.blocks.is_shared(page) for page in range(PAGES)] == [self.uses(page) > 1 for page in range(PAGES)]


PAGES_SETTINGS = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None)


def test_pages_against_a_naive_model() -> None:
    run_state_machine_as_test(Pages, settings=PAGES_SETTINGS)


def release_in_order(patch: pytest.MonkeyPatch) -> None:
    release = BlockManager.release
    patch.setattr(BlockManager, "release", lambda self, pages: release(self, pages[::-1]))


@pytest.mark.parametrize(
    "mutate",
    (release_in_order, key_without_parent, key_without_version, reused_page_still_cached),
    ids=lambda mutate: mutate.__name__,
)
def test_naive_model_notices(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    many = settings(PAGES_SETTINGS, max_examples=5000, phases=[Phase.generate])  # ends with the first that fails
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Pages, settings=many)
