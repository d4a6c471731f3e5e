"""transformers' scheduler, whose requests our `Generation` ends and whose batches lie in the order of slots."""

from __future__ import annotations

from typing import Any

from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from meswitch_cli.engine.contract import TokenLogprob
from meswitch_cli.engine.generation import Generation


class GenerationState(RequestState):  # type: ignore[misc]
    """A request as transformers schedules it, whose end our `Generation` decides."""

    generation: Generation
    chosen: TokenLogprob | None = None
    #: Whether what a token completes is told while the device computes the next batch.
    tells_later = False

    @classmethod
    def of(cls, generation: Generation, tokens: list[int], tells_later: bool) -> GenerationState:
        state = cls(request_id=generation.id, initial_tokens=tokens, max_new_tokens=None)
        state.generation, state.tells_later = generation, tells_later
        return state

    def update_and_check_completion(self, token_id: int, logprob: float | None) -> bool:
        if self.status != RequestStatus.DECODING:  # type: ignore[has-type]
            return False
        self.generated_tokens.append(token_id)
        self.tokens_to_process = [token_id]
        if token_id < 0:
            self.generation.end("error", "the model gave no token a finite score")
            over = True
        else:
            over = self.generation.accept(token_id, self.chosen, self.tells_later)
        if over:
            self.status = RequestStatus.FINISHED
        return over

    def create_equivalent_initial_request(self) -> GenerationState:
        """Begin again with what was generated as prompt: how transformers makes room in a full cache."""
        tokens = self.initial_tokens + self.generated_tokens
        return GenerationState.of(self.generation, tokens, self.tells_later)


class SlotOrderScheduler(FIFOScheduler):  # type: ignore[misc]
    """transformers' first in, first out, but that requests of one expert are taken together.

    An expert whose prompts are read costs a merge of its weights in every batch, however many prompts there are, so
    those who wait for the same slot as the one who has waited longest go with it. The one who has waited longest
    goes first in any case. Within a batch tokens of a slot lie together: their product reads and writes in place.
    """

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[Any, bool, int, int]:
        batch = self._continued(token_budget)
        if batch is not None:
            return batch, True, len(batch), 0
        batch, *rest = super().schedule_batch(token_budget, cache_budget)
        if batch:
            batch.sort(key=_slot_of)
        return (batch, *rest)

    def _continued(self, token_budget: int) -> list[FutureRequestState] | None:
        """The next token of every request, where nothing waits and all have room; what transformers would schedule too,
        after looking at each request anew. None where it has to."""
        states = self.active_requests.values()
        if self.waiting_requests or not 0 < len(states) <= min(token_budget, self.max_requests_per_batch):
            return None
        longest, page = self.cache.max_decode_fast_path_length, self.cache.smallest_page
        batch = []
        for state in states:
            place = state.position_offset
            if state.status != RequestStatus.DECODING or place >= longest or len(state.tokens_to_process) != 1:
                return None
            complete: dict[str, int] = {}
            if place % page in (0, page - 1):  # it begins a page, or ends one
                if not self.cache.can_store_request_tokens(state, 1):
                    return None
                complete = self.cache.count_new_complete_blocks(state, 1)
            batch.append(FutureRequestState(state, not state.remaining_prefill_tokens, complete, 1))
        self.starved_requests: list[tuple[RequestState, int]] = []
        return sorted(batch, key=_slot_of)

    def _get_waiting_candidates(self) -> list[GenerationState]:
        waiting: list[GenerationState] = super()._get_waiting_candidates()
        turns: dict[int, int] = {}
        for state in waiting:
            turns.setdefault(state.generation.slot, len(turns))
        return sorted(waiting, key=lambda state: turns[state.generation.slot])


def _slot_of(item: FutureRequestState) -> int:
    slot: int = item.state.generation.slot
    return slot
