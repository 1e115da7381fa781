"""Which tokens to forward next: one token budget a step, first come first served. No torch here.

A step first lets running sequences catch up (one token each when they decode, a chunk when they prefill),
then admits waiting ones with what is left. When pages run out the youngest running sequence gives its own
back and is recomputed later; the oldest can always go on, so the queue always drains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from rollout_engine.block_manager import ROOT, BlockManager
from rollout_engine.types import EngineStats, Sequence


class Chunk(NamedTuple):
    """Tokens ``start .. end`` of a sequence, to be forwarded in this step."""

    seq: Sequence
    start: int
    end: int
    samples: int  # how many next tokens to sample after it: 0 while the sequence is still catching up


@dataclass
class Schedule:
    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from page, to page), before the forward


class Scheduler:
    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        prefix_caching: bool,
        stats: EngineStats,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.prefix_caching = prefix_caching
        self.stats = stats
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.version = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def schedule(self) -> Schedule:
        """Choose this step's chunks and give them pages. Full pages enter the prefix cache here, before the
        forward that fills them, so that equal prompts admitted in one step share."""
        step = Schedule()
        budget = self.max_batch_tokens
        preempted = False
        done = 0
        while done < len(self.running) and budget:
            seq = self.running[done]
            end = min(len(seq.token_ids), seq.num_computed + budget)
            while not self._reserve(seq, end, step):
                preempted = True
                victim = self.running.pop()
                self.preempt(victim)
                if victim is seq:
                    break
            else:
                budget -= end - seq.num_computed
                self._append(step, seq, end)
                done += 1
        if not preempted:
            self._admit(step, budget)
        return step

    def _admit(self, step: Schedule, budget: int) -> None:
        slots = self.max_num_seqs - sum(seq.num_samples for seq in self.running)
        while self.waiting and budget and self.waiting[0].num_samples <= slots:
            seq = self.waiting[0]
            self._take_prefix(seq)
            end = min(len(seq.token_ids), seq.num_computed + budget)
            spare = self.blocks.num_free - (self.blocks.pages_for(end) - len(seq.pages))
            if spare < (self.blocks.num_pages // 100 if self.running else 0):
                self._give_up_pages(seq)
                return
            assert self._reserve(seq, end, step)
            self.running.append(self.waiting.popleft())
            self._count_hits(seq)
            slots -= seq.num_samples
            budget -= end - seq.num_computed
            self._append(step, seq, end)

    def _take_prefix(self, seq: Sequence) -> None:
        if self.prefix_caching:
            # The last token is always forwarded: its hidden state is what the next one is sampled from.
            seq.pages, seq.keys = self.blocks.match(seq.token_ids[:-1], self.version)
            self.blocks.share(seq.pages)
        seq.num_computed = len(seq.pages) * self.blocks.page_size

    def _count_hits(self, seq: Sequence) -> None:
        hits = max(0, seq.num_computed - seq.num_once)
        self.stats.cached += hits
        seq.group.num_cached += hits
        seq.num_once = max(seq.num_once, seq.num_computed)

    def _reserve(self, seq: Sequence, end: int, step: Schedule) -> bool:
        """Pages for tokens up to ``end``, with a private copy of a shared page about to be written."""
        size = self.blocks.page_size
        first = seq.num_computed // size
        copy = first < len(seq.pages) and self.blocks.is_shared(seq.pages[first])
        if not copy and end <= len(seq.pages) * size:
            return True
        needed = self.blocks.pages_for(end) - len(seq.pages)
        if needed + copy > self.blocks.num_free:
            return False
        if copy:
            page = self.blocks.allocate()
            step.copies.append((seq.pages[first], page))
            self.blocks.release([seq.pages[first]])
            seq.pages[first] = page
        seq.pages.extend(self.blocks.allocate() for _ in range(needed))
        return True

    def _append(self, step: Schedule, seq: Sequence, end: int) -> None:
        samples = seq.num_samples if end == len(seq.token_ids) else 0
        step.chunks.append(Chunk(seq, seq.num_computed, end, samples))
        if not self.prefix_caching:
            return
        size = self.blocks.page_size
        for i in range(len(seq.keys), end // size):
            parent = seq.keys[-1] if seq.keys else ROOT
            seq.keys.append(self.blocks.key(parent, seq.token_ids[i * size : (i + 1) * size], self.version))
            self.blocks.register(seq.pages[i], seq.keys[-1])

    def commit(self, step: Schedule) -> None:
        """The forward of ``step`` has run: its tokens are computed."""
        for seq, start, end, _ in step.chunks:
            self.stats.forwarded += end - start
            if start < seq.num_once:
                self.stats.recomputed += min(end, seq.num_once) - start
            seq.num_computed = end
            seq.num_once = max(seq.num_once, end)
        self.stats.steps += 1

    def fork(self, seq: Sequence) -> list[Sequence]:
        """The prompt is computed: one sequence per sample, all on the same pages. Returns all n of them."""
        seq.group.forked = True
        children = [
            Sequence(
                seq.group,
                index,
                list(seq.token_ids),
                num_computed=seq.num_computed,
                num_once=seq.num_once,
                pages=list(seq.pages),
                keys=list(seq.keys),
            )
            for index in range(1, seq.group.params.n)
        ]
        at = self.running.index(seq) + 1
        self.running[at:at] = children
        for child in children:
            self.blocks.share(child.pages)
        return [seq, *children]

    def preempt(self, seq: Sequence) -> None:
        """Give the pages back and queue for recomputation, first in line. Already taken off ``running``."""
        self._give_up_pages(seq)
        self.waiting.appendleft(seq)
        self.stats.preemptions += 1

    def preempt_all(self) -> None:
        while self.running:
            self.preempt(self.running.pop())

    def remove(self, finished: set[Sequence]) -> None:
        """Take sequences out, wherever they are."""
        if not finished:
            return
        for seq in finished:
            self._give_up_pages(seq)
        self.running = [seq for seq in self.running if seq not in finished]
        self.waiting = deque(seq for seq in self.waiting if seq not in finished)

    def _give_up_pages(self, seq: Sequence) -> None:
        self.blocks.release(seq.pages)
        seq.pages, seq.keys, seq.num_computed = [], [], 0

    def check_integrity(self) -> None:
        """Assert the invariants of pages and of every sequence's counters."""
        self.blocks.check_integrity(seq.pages for seq in self.sequences())
        for seq in self.sequences():
            assert 0 <= seq.num_computed <= len(seq.token_ids) <= seq.group.max_len
            assert len(seq.pages) >= self.blocks.pages_for(seq.num_computed)
        assert not any(seq.pages for seq in self.waiting)
        assert sum(seq.num_samples for seq in self.running) <= self.max_num_seqs
