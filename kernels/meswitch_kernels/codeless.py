"""Products of banks without codes, whose experts are a low-rank part alone; and of embeddings' low-rank parts.

All slots are multiplied together and each token keeps its own slot's share: shapes follow from tokens and slots alone,
nothing waits for the device, and no code is read. For S slots of rank r that adds S·r columns to the base's product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bank import BankTensors


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, bank: BankTensors, slot_of_token: Tensor) -> Tensor:
    """As `naive.expert_linear`, for a bank of 0 bits."""
    y = torch.nn.functional.linear(x, weight, bias).float()
    max_rank = bank.right.shape[1]
    if max_rank:
        z = torch.nn.functional.linear(x, bank.right.view(-1, x.shape[1]).to(x.dtype))
        left = bank.left.transpose(1, 2).reshape(-1, weight.shape[0]).to(x.dtype)
        y += own_share(z, slot_of_token, max_rank) @ left
    y += bank.bias_delta.index_select(0, _within(slot_of_token, bank)) * (slot_of_token >= 0).unsqueeze(1)
    return y.masked_fill_(_unservable(slot_of_token, bank).unsqueeze(1), torch.nan).to(x.dtype)


def expert_embedding(
    ids: Tensor, weight: Tensor, bank: BankTensors, added_rows: Tensor, slot_of_token: Tensor
) -> Tensor:
    """As `naive.expert_embedding`, for a bank of 0 bits."""
    vocab, slots = len(weight), _within(slot_of_token, bank)
    rows = weight[ids.clamp(max=vocab - 1)].float() + low_rank_rows(ids, vocab, bank, slot_of_token)
    if added_rows.shape[1]:
        own = added_rows[slots, (ids - vocab).clamp(0, added_rows.shape[1] - 1)].float()
        rows = torch.where(((ids >= vocab) & (slot_of_token >= 0)).unsqueeze(1), own, rows)
    return rows.masked_fill_(_unservable(slot_of_token, bank).unsqueeze(1), torch.nan).to(weight.dtype)


def low_rank_rows(ids: Tensor, vocab: int, bank: BankTensors, slot_of_token: Tensor) -> Tensor:
    """`[tokens, hidden]` fp32: what each token's slot adds to row `ids[t]` by its low-rank part; 0 from `vocab` on."""
    slots, max_rank, hidden = bank.right.shape
    factors = bank.left[_within(slot_of_token, bank), ids.clamp(max=vocab - 1)].float()
    factors = factors.masked_fill((ids >= vocab).unsqueeze(1), 0.0)
    spread = factors.repeat(1, slots)
    return own_share(spread, slot_of_token, max_rank) @ bank.right.view(slots * max_rank, hidden).float()


def own_share(z: Tensor, slot_of_token: Tensor, max_rank: int) -> Tensor:
    """`[tokens, slots * max_rank]`: the columns of z that are the token's own slot's, 0 in the others."""
    slots = torch.arange(z.shape[1] // max_rank if max_rank else 0, device=z.device)
    own = (slot_of_token.unsqueeze(1) == slots).repeat_interleave(max_rank, 1)
    return z.masked_fill(~own, 0.0)


def _within(slot_of_token: Tensor, bank: BankTensors) -> Tensor:
    return slot_of_token.clamp(0, bank.slot_bits.shape[0] - 1).long()


def _unservable(slot_of_token: Tensor, bank: BankTensors) -> Tensor:
    """Mask of the tokens whose slot is outside the bank or empty."""
    outside = (slot_of_token < -1) | (slot_of_token >= bank.slot_bits.shape[0])
    return outside | ((slot_of_token >= 0) & (bank.slot_bits[_within(slot_of_token, bank)] == 0))
