"""The paged cache, shared between requests of one expert only."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator


class SaltedCache(PagedAttentionCache):  # type: ignore[misc]
    """transformers' cache, whose shared blocks are found by tokens *and* by the model that computed them.

    Its own keys hash tokens alone, so that it would hand one expert the keys and values of another.
    """

    def __init__(self, *, paged: bool, **options: Any) -> None:
        """`paged`: requests have a table of their pages instead of a list of every row."""
        self._paged = paged
        super().__init__(**options)
        self._salts: dict[str, bytes] = {}
        #: Counts up where a request's list of blocks has changed but not grown.
        self.edition = 0
        self.smallest_page = min(allocator.tokens_per_page for allocator in self.cache_allocators.values())
        #: Requests whose prompts are computed whole.
        self.unshared: set[str] = set()
        #: Prompt tokens that were found in the cache, by request.
        self.matched: dict[str, int] = {}

    def admit(self, request_id: str, digest: str, shares: bool = True) -> None:
        """Say which model a request is for, before it is scheduled, and whether what is cached may be used for it."""
        if not shares:
            self.unshared.add(request_id)
        self._salts[request_id] = hashlib.sha256(digest.encode()).digest()

    def forget(self, request_id: str) -> None:
        self._salts.pop(request_id, None)
        self.matched.pop(request_id, None)
        self.unshared.discard(request_id)

    def count_blocks_used(self) -> int:
        """Blocks that running requests hold; those kept for later requests to share do not count."""
        return sum(
            len({block for table in allocator.block_table.values() for block in table})
            for allocator in self.cache_allocators.values()
        )

    def fill_block_table(self, request_id: str, past_length: int, query_length: int, block_table: Tensor) -> None:
        """Of rings too: our attention knows them, where the kernels that transformers calls do not."""
        for allocator in self.cache_allocators.values():
            own = block_table[allocator.index]
            FullAttentionCacheAllocator.fill_block_table(allocator, request_id, past_length, query_length, own)

    def _infer_max_decode_fast_path_length(self) -> int:
        pages: int = min(allocator.tokens_per_page for allocator in self.cache_allocators.values())
        return self.max_blocks_per_request * pages if self._paged else 0

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:
        if not self._paged:
            super().extend_read_and_write_indices(request_id, past_length, query_length, read_index, write_index)

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        if not self.use_prefix_sharing or request_id in self.unshared:
            return 0
        # Prefixes are shared only where every layer's attention is full, and then there is one allocator.
        (allocator,) = self.cache_allocators.values()
        page, parent, blocks = allocator.tokens_per_page, self._salts[request_id], []
        for start in range(0, (len(prompt_ids) - 1) // page * page, page):
            parent = block_key(parent, prompt_ids[start : start + page])
            block = allocator.ledger.hash_to_block.get(parent)
            if block is None:
                break
            blocks.append(block)
        if blocks:
            allocator.acquire_prefix_blocks(request_id, len(blocks) * page, blocks)
            self.matched.setdefault(request_id, len(blocks) * page)
        return len(blocks) * int(page)

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        if not complete_blocks or state.request_id not in self._salts:
            return
        (allocator,) = self.cache_allocators.values()
        (count,) = complete_blocks.values()
        page, parent = allocator.tokens_per_page, self._salts[state.request_id]
        tokens = state.initial_tokens + state.generated_tokens
        table = allocator.block_table[state.request_id]
        for index, block in enumerate(table):
            key = allocator.ledger.block_to_hash.get(block)
            if key is None:
                own = tokens[index * page : (index + 1) * page]
                if count == 0 or len(own) < page:
                    break
                key = block_key(parent, own)
                count -= 1
                twin = allocator.ledger.register_new_hash(block, key)
                if twin is not None:
                    allocator.ledger.acquire(twin)
                    table[index] = twin
                    self.edition += 1
                    if allocator.ledger.release(block):
                        allocator.pool.free_blocks(allocator.index, [block])
            parent = key


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block, from the key of the one before it (or the salt) and the tokens it holds."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(array("i", tokens).tobytes())
    return digest.digest()
