"""Random numbers as a pure function of (seed, epoch, image, stream): no generator state anywhere.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which turns a
64-bit key and a 128-bit counter into four 32-bit words. The key is the seed; the counter names what the words are for:

    word 0, 1   image id, low and high half
    word 2      epoch
    word 3      stream * 2^16 + block        (a block is four words; a stream keeps two users of one image apart)

So what an image looks like depends neither on the batch it is in, nor on workers, ranks, devices or restarts.

B = images, K = blocks. All arithmetic is int64 on values below 2^32; their products wrap, which the masks undo.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fewlabels.errors import UsageError

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
ORDER = 0xFFFF  # the stream of permutations; views use small numbers
CHUNK = 1 << 17  # blocks that permutation computes at once: about 20 MB of working memory


def uniforms(seed: int, epoch: int, ids: Tensor, stream: int, count: int) -> Tensor:
    """Uniform numbers for each image.

    Args:
        seed: 0 to 2^64 - 1.
        epoch: 0 to 2^32 - 1.
        ids: int64 (B,), the images' numbers.
        stream: 0 to 2^16 - 1; equal arguments give equal numbers, another stream gives independent ones.
        count: numbers per image, at most 2^18 - 4.

    Returns:
        (B, count) float32 in [0, 1), multiples of 2^-24, on the device of ids. A larger count only adds numbers.

    Raises:
        UsageError: a number is out of its range.
    """
    blocks = -(-count // 4)
    words = _words(seed, epoch, ids, stream, blocks)[:, :count]
    return (words >> 8).to(torch.float32) * 2.0**-24


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n things: int64 (n,), the same on every machine and with every version of every library.

    It is the stable argsort of n 64-bit words: word i is half i % 2 of the block with id i // 2.
    """
    keys = np.empty(n + n % 2, dtype=np.uint64)
    for first in range(0, (n + 1) // 2, CHUNK):
        ids = torch.arange(first, min(first + CHUNK, (n + 1) // 2))
        words = _words(seed, epoch, ids, ORDER, 1).numpy().astype(np.uint64)
        keys[2 * first : 2 * first + 2 * len(ids)] = (words[:, 0::2] | words[:, 1::2] << np.uint64(32)).ravel()
    return np.argsort(keys[:n], kind="stable")


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: (..., 4) int64 counter words and two key words, all in [0, 2^32) -> (..., 4) random words."""
    even, odd = counter[..., 0::2], counter[..., 1::2]  # (..., 2) each; both halves of a round run as one operation
    first = torch.arange(2, device=counter.device) == 0  # built on the device: a copy from the host would synchronise
    multiplier = torch.where(first, MULTIPLIERS[0], MULTIPLIERS[1])
    for turn in range(ROUNDS):
        keys = [(word + turn * step) & MASK for word, step in zip(key, KEY_STEPS, strict=True)]
        round_key = torch.where(first, keys[0], keys[1])
        product = even * multiplier  # wraps; the mask takes off what its sign shifts in
        even, odd = (product >> 32 & MASK).flip(-1) ^ odd ^ round_key, (product & MASK).flip(-1)
    return torch.stack([even, odd], dim=-1).flatten(-2)


def check_key(seed: int, epoch: int, stream: int, blocks: int) -> None:
    """Raise UsageError for a number that the counter or the key cannot hold."""
    for name, value, bits in (("seed", seed, 64), ("epoch", epoch, 32), ("stream", stream, 16), ("blocks", blocks, 16)):
        if not (hasattr(value, "__index__") and 0 <= value < 1 << bits):
            raise UsageError(f"{name} {value} is out of range", fix=f"use a whole number from 0 to 2^{bits} - 1")


def _words(seed: int, epoch: int, ids: Tensor, stream: int, blocks: int) -> Tensor:
    """(B, 4 * blocks) int64 random words in [0, 2^32)."""
    check_key(seed, epoch, stream, blocks)
    block = stream * 65536 + torch.arange(blocks, device=ids.device)  # (K,)
    words = [ids[:, None] & MASK, (ids[:, None] >> 32) & MASK, torch.full_like(block, epoch), block]
    counter = torch.stack([word.expand(len(ids), blocks) for word in words], dim=-1)  # (B, K, 4)
    return philox(counter, (seed & MASK, seed >> 32)).flatten(1)
