"""Who owns which KV page: reference counts, an LRU free list and the versioned prefix cache. No torch here.

A page is *owned* (reference count > 0), or *free*; a free page may still hold a cached prefix and is
handed out again least recently used first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

ROOT = b""


class BlockManager:
    """Pages ``0 .. num_pages``, each of ``page_size`` tokens."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self._refs = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._key_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def key(self, parent: bytes, token_ids: Sequence[int], version: int) -> bytes:
        """Prefix-cache key of a full page: all tokens up to its end, and the weights that made its KV."""
        state = hashlib.blake2b(parent, digest_size=16)
        state.update(array("q", (version, *token_ids)))
        return state.digest()

    def match(self, token_ids: Sequence[int], version: int) -> tuple[list[int], list[bytes]]:
        """Cached pages that hold the longest prefix of full pages of ``token_ids``, and their keys."""
        pages: list[int] = []
        keys: list[bytes] = []
        for begin in range(0, len(token_ids) - self.page_size + 1, self.page_size):
            key = self.key(keys[-1] if keys else ROOT, token_ids[begin : begin + self.page_size], version)
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
            keys.append(key)
        return pages, keys

    def allocate(self) -> int:
        """Take the least recently used free page; what it cached is forgotten. The caller checked ``num_free``."""
        page, _ = self._free.popitem(last=False)
        self._forget(page)
        self._refs[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each of these pages (a fork, or a prefix hit)."""
        for page in pages:
            if self._refs[page] == 0:
                del self._free[page]
            self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One owner fewer. Later pages become reusable first, so that short prefixes stay cached longest."""
        for page in reversed(pages):
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free[page] = None

    def is_shared(self, page: int) -> bool:
        return self._refs[page] > 1

    def register(self, page: int, key: bytes) -> None:
        """Enter a page that this step fills. The first page with a key stays; equal ones are just not cached."""
        if key not in self._page_of and self._key_of[page] is None:
            self._page_of[key] = page
            self._key_of[page] = key

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; owned pages stay with their owners."""
        self._page_of.clear()
        self._key_of = [None] * self.num_pages

    def _forget(self, page: int) -> None:
        key = self._key_of[page]
        if key is not None:
            del self._page_of[key]
            self._key_of[page] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that free and owned pages partition the pool and that counts equal the tables' use of a page."""
        used = Counter(page for table in tables for page in table)
        for page, refs in enumerate(self._refs):
            assert refs == used[page], f"page {page}: {refs} references, {used[page]} uses"
            assert (refs == 0) == (page in self._free), f"page {page}: {refs} references, free={page in self._free}"
        assert len(self._free) + len(used) == self.num_pages
        assert all(self._key_of[page] == key for key, page in self._page_of.items())
        assert sum(key is not None for key in self._key_of) == len(self._page_of)
