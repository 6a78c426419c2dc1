"""A weightless mask predictor that anyone can rebuild: its logits are a hash of the visible canvas.

The numbers in `golden/official_generate.json` are what the official LLaDA sampler (ML-GSAI/LLaDA, commit b7e6c35)
answered on it. Integers are 64-bit and no product overflows.
"""

import torch
from torch import Tensor

PRIME = 2**31 - 1
VOCAB, MASK_ID, EOS_ID = 48, 47, 1


def hash_oracle(ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    "Logits (B, L, 48) in float64, in [-3, 3], with -30 for MASK; positions with attention 0 drop out."
    length = ids.shape[1]
    place = torch.arange(length)
    distance = place[None, :] - place[:, None] + 4096  # (i, j)
    pair = ((ids[:, None, :] + 1) * 7919 + distance * 104729) % PRIME  # (B, i, j)
    weight = (pair * pair) % PRIME
    if attention_mask is not None:
        weight = weight * attention_mask.to(torch.long)[:, None, :]
    code = weight.sum(-1) % PRIME  # (B, L)
    u = (code[..., None] + 1640531527 * (torch.arange(VOCAB) + 1)) % PRIME
    u = (u * u) % PRIME
    u = (u * 48271 + 11) % PRIME
    u = (u * u) % PRIME
    logits = 6 * u.to(torch.float64) / PRIME - 3
    logits[..., MASK_ID] = -30.0
    return logits
