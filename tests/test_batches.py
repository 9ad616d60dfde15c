"""Which items share a batch."""

from __future__ import annotations

from visrl.train.sampler import SameImageSampler


def batches(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_questions_of_a_picture_share_a_batch() -> None:
    pictures = [f"p{n // 2}" for n in range(20)]
    sampler = SameImageSampler(pictures, 4, seed=1)
    for epoch in range(3):
        order = sampler.order(epoch)
        assert sorted(order) == list(range(20))
        for batch in batches(order, 4):
            assert all(sum(pictures[n] == pictures[m] for m in batch) == 2 for n in batch)
    assert sampler.sharing() == 20
    assert sampler.order(0) != sampler.order(1)
    assert sampler.order(1) == SameImageSampler(pictures, 4, seed=1).order(1)
    assert sampler.order(1) != SameImageSampler(pictures, 4, seed=2).order(1)


def test_groups_of_uneven_size_fill_whole_batches() -> None:
    """5 + 2 + 2 questions and 3 alone in batches of 4: the five need two batches, no other picture is broken."""
    pictures = [*"aaaaa", *"bb", *"cc", *"def"]
    order = SameImageSampler(pictures, 4, seed=3).order(0)
    assert sorted(order) == list(range(12))
    shown = [{pictures[n] for n in batch} for batch in batches(order, 4)]
    assert [sum("a" in batch for batch in shown), sum("b" in batch for batch in shown)] == [2, 1]
    assert sum("c" in batch for batch in shown) == 1


def test_a_group_is_broken_where_none_fits() -> None:
    """Two groups of two in batches of three: one picture has to span two batches."""
    order = SameImageSampler([*"aabb"], 3, seed=0).order(0)
    assert sorted(order) == [0, 1, 2, 3]
    assert SameImageSampler([*"aabb"], 3, seed=0).sharing() == 2


def test_pictures_shown_once_are_a_plain_shuffle() -> None:
    sampler = SameImageSampler([str(n) for n in range(50)], 8, seed=0)
    assert sorted(sampler) == list(range(50))
    assert sampler.order(0) != list(range(50))
    assert sampler.sharing() == 0
