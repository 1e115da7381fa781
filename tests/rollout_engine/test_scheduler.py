"""Schedules computed by hand, on pages of four tokens."""

from __future__ import annotations

import itertools

import pytest

from rollout_engine.block_manager import BlockManager
from rollout_engine.scheduler import Schedule, Scheduler
from rollout_engine.types import EngineStats, Group, SamplingParams, Sequence


class Bench:
    """A scheduler whose sequences are called a, b, c, ...; every sampled token is a 7."""

    def __init__(self, *, pages: int = 50, seqs: int = 10, tokens: int = 100, caching: bool = False) -> None:
        self.stats = EngineStats()
        self.scheduler = Scheduler(
            BlockManager(pages, 4),
            max_num_seqs=seqs,
            max_batch_tokens=tokens,
            prefix_caching=caching,
            stats=self.stats,
        )
        self.names: dict[tuple[int, int], str] = {}
        self.letters = itertools.cycle("abcdefghijklmnopqrstuvwxyz")
        self.ids = itertools.count()

    def add(self, prompt: list[int] | int, n: int = 1, longest: int = 99) -> Sequence:
        """Queue a prompt, or one of so many tokens unlike all others; named by the next letter, samples by number."""
        request = next(self.ids)
        tokens = prompt if isinstance(prompt, list) else [100 * (request + 1) + i for i in range(prompt)]
        letter = next(self.letters)
        self.names |= {(request, index): f"{letter}{index or ''}" for index in range(n)}
        group = Group(request, None, tokens, SamplingParams(n=n), 0, list(range(n)), longest)
        seq = Sequence(group, 0, list(tokens))
        self.scheduler.add(seq)
        return seq

    def name(self, seq: Sequence) -> str:
        return self.names[seq.group.request_id, seq.index]

    def step(self) -> list[tuple[str, int, int, int]]:
        """One step with its tokens sampled: (name, start, end, samples) of each chunk."""
        return self.finish(self.scheduler.schedule())

    def finish(self, schedule: Schedule) -> list[tuple[str, int, int, int]]:
        shown = [(self.name(chunk.seq), chunk.start, chunk.end, chunk.samples) for chunk in schedule.chunks]
        self.scheduler.commit(schedule)
        for chunk in schedule.chunks:
            if chunk.samples:
                for seq in [chunk.seq] if chunk.seq.group.forked else self.scheduler.fork(chunk.seq):
                    seq.token_ids.append(7)
        self.scheduler.check_integrity()
        return shown

    def running(self) -> list[str]:
        return [self.name(seq) for seq in self.scheduler.running]

    def waiting(self) -> list[str]:
        return [self.name(seq) for seq in self.scheduler.waiting]


# ---------------------------------------------------------------- the token budget


def test_budget_is_split_over_two_prompts() -> None:
    bench = Bench(tokens=10)
    bench.add(7)
    bench.add(9)
    assert bench.step() == [("a", 0, 7, 1), ("b", 0, 3, 0)]
    assert bench.step() == [("a", 7, 8, 1), ("b", 3, 9, 1)]
    assert bench.step() == [("a", 8, 9, 1), ("b", 9, 10, 1)]
    assert (bench.stats.forwarded, bench.stats.recomputed, bench.stats.steps) == (10 + 7 + 2, 0, 3)


def test_chunk_boundaries_of_a_long_prompt() -> None:
    bench = Bench(tokens=8)
    seq = bench.add(21)
    pages = []
    for expected in (("a", 0, 8, 0), ("a", 8, 16, 0), ("a", 16, 21, 1), ("a", 21, 22, 1)):
        assert bench.step() == [expected]
        pages.append(len(seq.pages))
    assert pages == [2, 4, 6, 6]


def test_a_prompt_of_exactly_the_budget_samples_at_once_and_one_more_token_does_not() -> None:
    exact, more = Bench(tokens=8), Bench(tokens=8)
    exact.add(8)
    more.add(9)
    assert exact.step() == [("a", 0, 8, 1)]
    assert more.step() == [("a", 0, 8, 0)]
    assert more.step() == [("a", 8, 9, 1)]


def test_running_go_before_waiting_and_the_oldest_go_first() -> None:
    bench = Bench(tokens=3)
    for _ in range(4):
        bench.add(1)
    assert bench.step() == [("a", 0, 1, 1), ("b", 0, 1, 1), ("c", 0, 1, 1)]
    assert bench.step() == [("a", 1, 2, 1), ("b", 1, 2, 1), ("c", 1, 2, 1)]
    assert bench.waiting() == ["d"]
    bench.scheduler.remove({bench.scheduler.running[1]})
    assert bench.step() == [("a", 2, 3, 1), ("c", 2, 3, 1), ("d", 0, 1, 1)]


def test_budget_used_up_before_the_last_running_sequence_leaves_it_as_it_was() -> None:
    bench = Bench(tokens=6)
    bench.add(5)
    bench.add(3)
    assert bench.step() == [("a", 0, 5, 1), ("b", 0, 1, 0)]
    bench.scheduler.max_batch_tokens = 1
    assert bench.step() == [("a", 5, 6, 1)]
    assert bench.scheduler.running[1].num_computed == 1
    bench.scheduler.max_batch_tokens = 2
    assert bench.step() == [("a", 6, 7, 1), ("b", 1, 2, 0)]


# ---------------------------------------------------------------- admission


def test_admission_order_is_kept_though_a_later_prompt_would_fit() -> None:
    bench = Bench(pages=6)
    bench.add(16)
    bench.add(12)  # three pages, two are free
    bench.add(1)
    assert bench.step() == [("a", 0, 16, 1)]
    assert bench.waiting() == ["b", "c"]
    bench.scheduler.remove({bench.scheduler.running[0]})
    assert bench.step() == [("b", 0, 12, 1), ("c", 0, 1, 1)]


def test_max_num_seqs_counts_the_answers_of_a_group_before_and_after_it_forks() -> None:
    bench = Bench(seqs=4, tokens=6)
    bench.add(8, n=3)
    bench.add(2, n=2)
    bench.add(2)
    assert bench.step() == [("a", 0, 6, 0)]
    assert bench.step() == [("a", 6, 8, 3)]  # four tokens left, but b is two answers
    assert bench.running() == ["a", "a1", "a2"]
    assert bench.waiting() == ["b", "c"]
    bench.scheduler.remove({bench.scheduler.running[2]})
    assert bench.step() == [("a", 8, 9, 1), ("a1", 8, 9, 1), ("b", 0, 2, 2)]
    assert bench.running() == ["a", "a1", "b", "b1"]
    bench.scheduler.remove(set(bench.scheduler.running[:1]))
    assert bench.step() == [("a1", 9, 10, 1), ("b", 2, 3, 1), ("b1", 2, 3, 1), ("c", 0, 2, 1)]


@pytest.mark.parametrize(("pages", "admitted"), ((98, ["a", "b", "c"]), (99, ["a", "b"]), (100, ["a"])))
def test_admission_keeps_a_hundredth_of_the_pool_for_those_running(pages: int, admitted: list[str]) -> None:
    bench = Bench(pages=201, tokens=1000)
    bench.add(4 * 100, longest=900)
    bench.add(4 * pages, longest=900)  # leaves 3, 2 or 1 pages; 2 are kept
    bench.add(1)
    assert [chunk[0] for chunk in bench.step()] == admitted


def test_with_nobody_running_a_prompt_may_take_the_whole_pool() -> None:
    bench = Bench(pages=200, tokens=1000)
    bench.add(4 * 200, longest=900)
    assert bench.step() == [("a", 0, 800, 1)]


# ---------------------------------------------------------------- forks and preemption


def test_fork_copies_the_half_full_page_for_all_but_the_last() -> None:
    bench = Bench()
    first = bench.add(6, n=3)
    assert bench.step() == [("a", 0, 6, 3)]
    assert first.pages == [0, 1]
    schedule = bench.scheduler.schedule()
    assert schedule.copies == [(1, 2), (1, 3)]
    assert [chunk.seq.pages for chunk in schedule.chunks] == [[0, 2], [0, 3], [0, 1]]
    assert bench.finish(schedule) == [("a", 6, 7, 1), ("a1", 6, 7, 1), ("a2", 6, 7, 1)]
    assert bench.scheduler.blocks.num_free == 46


def test_fork_at_a_page_boundary_copies_nothing() -> None:
    bench = Bench()
    bench.add(8, n=3)
    bench.step()
    schedule = bench.scheduler.schedule()
    assert schedule.copies == []
    assert [chunk.seq.pages for chunk in schedule.chunks] == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]


def test_youngest_is_preempted_first_and_the_queue_keeps_its_order() -> None:
    bench = Bench(pages=4)
    for _ in range(4):
        bench.add(4)
    bench.add(1)
    # Four pages full; a and b take the pages of d and c for their fifth token. Nobody is admitted in such a step.
    assert [chunk[0] for chunk in bench.step()] == ["a", "b", "c", "d"]
    assert bench.step() == [("a", 4, 5, 1), ("b", 4, 5, 1)]
    assert (bench.running(), bench.waiting()) == (["a", "b"], ["c", "d", "e"])
    assert bench.stats.preemptions == 2
    assert bench.step() == [("a", 5, 6, 1), ("b", 5, 6, 1)]
    bench.scheduler.remove({bench.scheduler.running[0]})
    # c comes back with its sampled token: five tokens, two pages; there is no third for d.
    assert bench.step() == [("b", 6, 7, 1), ("c", 0, 5, 1)]
    assert bench.waiting() == ["d", "e"]
    assert (bench.stats.forwarded, bench.stats.recomputed) == (16 + 2 + 2 + 6, 4)


def test_a_sequence_that_finds_no_page_and_nobody_younger_preempts_itself() -> None:
    bench = Bench(pages=3)
    bench.add(8)
    bench.add(4)
    bench.step()
    assert bench.step() == [("a", 8, 9, 1)]  # a took b's page
    assert (bench.running(), bench.waiting()) == (["a"], ["b"])
    late = Bench(pages=3)
    late.add(6)
    late.add(4)
    late.step()
    assert late.step() == [("a", 6, 7, 1)]  # b needs a second page, and is itself the youngest
    assert (late.running(), late.waiting()) == (["a"], ["b"])


def test_preempt_all_keeps_the_order_and_counts_a_recompute_only_of_what_was_computed() -> None:
    bench = Bench(tokens=10)
    bench.add(6)
    bench.add(7)
    bench.add(2)
    assert bench.step() == [("a", 0, 6, 1), ("b", 0, 4, 0)]
    bench.scheduler.preempt_all()
    assert (bench.running(), bench.waiting()) == ([], ["a", "b", "c"])
    assert bench.step() == [("a", 0, 7, 1), ("b", 0, 3, 0)]
    assert bench.step() == [("a", 7, 8, 1), ("b", 3, 7, 1), ("c", 0, 2, 1)]
    # Again: six of a's tokens, three and then one of b's. The seventh of a is new.
    assert (bench.stats.forwarded, bench.stats.recomputed) == (10 + 10 + 7, 6 + 3 + 1)


# ---------------------------------------------------------------- prefix hits


def test_prompts_of_one_step_share_the_pages_of_their_common_prefix() -> None:
    bench = Bench(caching=True)
    first = bench.add([1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = bench.add([1, 2, 3, 4, 5, 6, 7, 8, 10, 11])
    third = bench.add([1, 2, 3, 4, 5, 6, 7, 8])  # its last token has to be forwarded, so its second page is its own
    assert bench.step() == [("a", 0, 9, 1), ("b", 8, 10, 1), ("c", 4, 8, 1)]
    assert (first.pages, second.pages, third.pages) == ([0, 1, 2], [0, 1, 3], [0, 4])
    assert [seq.group.num_cached for seq in (first, second, third)] == [0, 8, 4]
    assert (bench.stats.cached, bench.stats.forwarded) == (12, 9 + 2 + 4)


@pytest.mark.parametrize("caching", (True, False))
def test_chunk_of_this_step_is_hit_only_as_far_as_it_goes(caching: bool) -> None:
    bench = Bench(caching=caching, tokens=9)
    bench.add(list(range(14)))
    assert bench.step() == [("a", 0, 9, 0)]
    bench.add(list(range(14)))
    second = bench.step()
    assert second == [("a", 9, 14, 1), ("b", 12, 14, 1) if caching else ("b", 0, 4, 0)]


def test_a_preempted_sequence_finds_its_own_pages_and_that_is_no_hit() -> None:
    bench = Bench(caching=True)
    seq = bench.add(9)
    bench.step()
    bench.scheduler.preempt_all()
    assert bench.step() == [("a", 8, 10, 1)]
    assert (bench.stats.cached, seq.group.num_cached) == (0, 0)
    assert (bench.stats.forwarded, bench.stats.recomputed) == (9 + 2, 1)
