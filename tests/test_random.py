"""Philox against the published vectors and a big-integer twin; uniformity; purity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewlabels import random
from fewlabels.errors import UsageError

KNOWN = [  # Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def twin(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as in the paper's text, with Python's integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k, q % 2**32, (p >> 32) ^ d ^ m, p % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def twin_words(seed: int, epoch: int, image: int, stream: int, blocks: int) -> list[int]:
    key, image = [seed % 2**32, seed >> 32], image % 2**64
    counters = [[image % 2**32, image >> 32, epoch, stream * 2**16 + block] for block in range(blocks)]
    return [word for counter in counters for word in twin(counter, key)]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    words = random.philox(torch.tensor(hexadecimal(counter)), tuple(hexadecimal(key)))
    assert words.tolist() == hexadecimal(result) == twin(hexadecimal(counter), hexadecimal(key))


@pytest.mark.parametrize(
    ("seed", "epoch", "stream"), [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**16 - 1), (0x1234567890ABCDEF, 7, 3)]
)
def test_uniforms_equal_the_twin(seed: int, epoch: int, stream: int) -> None:
    images = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -1]
    numbers = random.uniforms(seed, epoch, torch.tensor(images), stream, 10)
    expected = [[(w >> 8) / 2**24 for w in twin_words(seed, epoch, i, stream, 3)[:10]] for i in images]
    assert numbers.dtype == torch.float32
    assert numbers.shape == (7, 10)
    assert numbers.tolist() == expected


def test_uniforms_do_not_depend_on_the_batch_or_the_count() -> None:
    ids = torch.arange(100)
    whole = random.uniforms(5, 1, ids, 2, 9)
    order = torch.randperm(100)
    assert torch.equal(random.uniforms(5, 1, order, 2, 9), whole[order])
    assert torch.equal(torch.cat([random.uniforms(5, 1, part, 2, 9) for part in ids.split(7)]), whole)
    assert torch.equal(random.uniforms(5, 1, ids, 2, 21)[:, :9], whole)
    assert random.uniforms(5, 1, ids[:0], 2, 9).shape == (0, 9)


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    before, ids = torch.get_rng_state(), torch.arange(4)
    first, order = random.uniforms(0, 0, ids, 0, 4), random.permutation(0, 0, 20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert torch.equal(random.uniforms(0, 0, ids, 0, 4), first)
    assert np.array_equal(random.permutation(0, 0, 20), order)


def test_every_part_of_the_key_matters() -> None:
    ids = torch.tensor([3])
    base = {"seed": 1, "epoch": 2, "ids": ids, "stream": 4, "count": 8}
    changes = [{"seed": 2}, {"seed": 1 + 2**32}, {"epoch": 3}, {"ids": ids + 1}, {"ids": ids + 2**32}, {"stream": 5}]
    made = [random.uniforms(**{**base, **change}) for change in [{}, *changes]]
    for number, first in enumerate(made):
        assert all((first != other).sum() >= 7 for other in made[:number])


def test_numbers_are_uniform_and_independent() -> None:
    numbers = random.uniforms(0, 0, torch.arange(20_000), 0, 8).double()
    other_stream = random.uniforms(0, 0, torch.arange(20_000), 1, 8).double()
    counts = torch.histc(numbers.flatten(), 100, 0, 1)
    chi_square = ((counts - 1600).square() / 1600).sum()
    assert 58 < chi_square < 150  # 99 degrees of freedom: both tails below 1e-3
    assert 0 <= numbers.min() < 1e-4 < 1 - 1e-4 < numbers.max() < 1
    next_image = numbers.roll(1, dims=0)
    together = torch.cat([numbers, other_stream, next_image[:, :2]], dim=1)
    correlation = torch.corrcoef(together.T)
    assert (correlation - torch.eye(18)).abs().max() < 4.5 / 20_000**0.5


def test_permutation_is_the_sorted_order_of_the_twin_words() -> None:
    for n in (0, 1, 2, 11, 64):
        words = [w for block in range((n + 1) // 2) for w in twin_words(7, 3, block, random.ORDER, 1)]
        keys = [words[i] | words[i + 1] << 32 for i in range(0, len(words), 2)][:n]
        order = random.permutation(7, 3, n)
        assert order.dtype == np.int64
        assert order.tolist() == sorted(range(n), key=keys.__getitem__)


def test_permutation_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random.permutation(1, 2, 1001)
    assert np.array_equal(np.sort(whole), np.arange(1001))
    monkeypatch.setattr(random, "CHUNK", 64)
    assert np.array_equal(random.permutation(1, 2, 1001), whole)


def test_permutations_of_epochs_and_seeds_differ_and_are_fair() -> None:
    orders = [random.permutation(*arguments) for arguments in [(1, 2, 50), (1, 3, 50), (2, 2, 50)]]
    assert all((orders[i] != orders[j]).sum() > 40 for i in range(3) for j in range(i))
    places = np.stack([random.permutation(0, epoch, 5) for epoch in range(1500)])
    counts = np.stack([np.bincount(places[:, place], minlength=5) for place in range(5)])
    assert abs(counts - 300).max() < 70  # standard deviation 15.5


@pytest.mark.parametrize(
    "wrong", [{"seed": -1}, {"seed": 2**64}, {"epoch": -1}, {"epoch": 1.5}, {"stream": 2**16}, {"count": 2**18 + 1}]
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    arguments = {"seed": 0, "epoch": 0, "stream": 0, "count": 1, **wrong}
    with pytest.raises(UsageError, match="out of range"):
        random.uniforms(ids=torch.arange(1), **arguments)


def test_the_compiled_numbers_are_the_same() -> None:
    philox = pytest.importorskip("fewlabels.data.philox")
    ids = torch.tensor([0, 5, 2**32, 2**40 + 3, 2**62, 7])
    for seed, epoch, stream, count in ((0, 0, 0, 1), (2**64 - 1, 2**32 - 1, 2**16 - 1, 23), (2**40 + 5, 3, 9, 12)):
        made = philox.uniforms(seed, epoch, ids, stream, count)
        assert torch.equal(made, random.uniforms(seed, epoch, ids, stream, count))
        assert torch.equal(philox.uniforms(seed, epoch, ids[1::2], stream, count), made[1::2])
    with pytest.raises(UsageError, match="epoch"):
        philox.uniforms(0, 2**32, ids, 0, 4)
