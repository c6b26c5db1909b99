"""Tier one: numbers that look random and are the same everywhere."""

from __future__ import annotations

import torch

from lightning_powersgd.exchange.hashing import random_signs, random_words

CPU = torch.device("cpu")


def test_words_are_the_same_everywhere():
    # Published of SplitMix64 with the seed 0.
    published = [0xE220A8397B1DCDAF - 2**64, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert random_words(3, CPU).tolist() == published
    assert len(set(random_words(1000, CPU).tolist())) == 1000
    assert random_words(3, CPU).equal(random_words(5, CPU)[:3])
    assert random_words(3, CPU, first=2).equal(random_words(5, CPU)[2:])


def test_signs_follow_from_their_places_and_are_even():
    signs = random_signs(64 * 1024, CPU)
    assert set(signs.tolist()) == {-1, 1}
    assert abs(int(signs.sum())) < 4 * len(signs) ** 0.5
    assert random_signs(640, CPU, first=128).equal(signs[128:768])
    # Neighbours have nothing to do with each other, near or far.
    for distance in (1, 8, 64, 512):
        assert abs(int((signs[:-distance] * signs[distance:]).sum(dtype=torch.int64))) < 4 * len(signs) ** 0.5
