"""Trees and packing against literal arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from visrl.models.encode import EncodedView, TokenPath
from visrl.models.families import FAMILIES
from visrl.packing.pack import pack
from visrl.packing.tree import PrefixTree, prefix_trees

PICTURE = 99  # the image token of hand-made paths
TEXT_ONLY = FAMILIES["llava"]


def view(key: str, tokens: int) -> EncodedView:
    pixels = {"pixel_values": torch.full((1, 2), float(ord(key[0])))}
    return EncodedView(key, pixels, "", tokens, (1, 1, tokens), (1, 1))


def path(*ids: int, start: int, views: tuple[EncodedView, ...] = ()) -> TokenPath:
    return TokenPath(np.array(ids), np.arange(len(ids))[None], views, start)


# --- literal arrays ---------------------------------------------------------------------------------------------------


def test_two_answers_share_their_prompt() -> None:
    tree = prefix_trees([[path(1, 2, 3, 4, start=2), path(1, 2, 5, start=2)]], PICTURE)[0]
    assert tree.size == 5
    assert np.concatenate(tree.ids).tolist() == [1, 2, 3, 4, 5]
    assert np.concatenate(tree.positions, axis=1).tolist() == [[0, 1, 2, 3, 2]]
    assert [places.tolist() for places, _ in tree.paths] == [[0, 1, 2, 3], [0, 1, 4]]


def test_a_path_inside_another_adds_nothing() -> None:
    tree = prefix_trees([[path(1, 2, 3, start=1), path(1, 2, start=1), path(1, 2, 3, start=2)]], PICTURE)[0]
    assert tree.size == 3
    assert [places.tolist() for places, _ in tree.paths] == [[0, 1, 2], [0, 1], [0, 1, 2]]


def test_equal_tokens_of_different_pictures_are_not_shared() -> None:
    a, b = view("a", 2), view("b", 2)
    tree = PrefixTree()
    for one in (a, b, a):
        tree.add(path(1, PICTURE, PICTURE, 7, start=3, views=(one,)), PICTURE)
    assert tree.size == 4 + 3
    assert [v.key for v in tree.views] == ["a", "b"]


def test_a_second_picture_comes_after_the_first() -> None:
    a, b = view("a", 2), view("b", 1)
    tree = PrefixTree()
    tree.add(path(1, PICTURE, PICTURE, 7, start=3, views=(a,)), PICTURE)
    tree.add(path(1, PICTURE, PICTURE, PICTURE, 8, start=4, views=(a, b)), PICTURE)
    assert [v.key for v in tree.views] == ["a", "b"]
    assert tree.paths[1][0].tolist() == [0, 1, 2, 4, 5]


def test_image_tokens_must_equal_image_features() -> None:
    with pytest.raises(ValueError, match="1 image tokens for 2 image features"):
        PrefixTree().add(path(1, PICTURE, 7, start=2, views=(view("a", 2),)), PICTURE)


def test_packed_arrays_of_one_tree() -> None:
    trees = prefix_trees([[path(1, 2, 3, 4, start=2), path(1, 2, 5, start=2)]], PICTURE)
    packed = pack(trees, TEXT_ONLY, PICTURE)
    call = packed.calls[0]
    assert call.inputs["input_ids"].shape == (1, 64)
    assert call.inputs["input_ids"][0, :6].tolist() == [1, 2, 3, 4, 5, 0]
    assert call.inputs["position_ids"][0, :6].tolist() == [0, 1, 2, 3, 2, 0]
    assert call.inputs["attention_mask"][0, 0, :6, :6].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],  # the other answer: the prompt and itself, not 3 and 4
        [0, 0, 0, 0, 0, 1],  # padding sees itself
    ]
    assert call.keep.tolist() == [1, 2]  # 1 predicts 3 and 5, 2 predicts 4
    assert packed.row.tolist() == [0, 1, 0]
    assert packed.target.tolist() == [3, 4, 5]
    assert packed.branch.tolist() == [0, 0, 1]
    assert (packed.tokens, packed.separate_tokens, packed.branches) == (5, 7, 2)
    assert "pixel_values" not in call.inputs


def test_trees_in_several_bins_do_not_meet() -> None:
    long = [path(*range(10, 70), start=50), path(*range(10, 60), 80, start=50)]
    trees = prefix_trees([long, [path(1, 2, start=1)], long], PICTURE)
    packed = pack(trees, TEXT_ONLY, PICTURE, bin_length=64)
    mask = packed.calls[0].inputs["attention_mask"]
    ids = packed.calls[0].inputs["input_ids"]
    assert mask.shape == (2, 1, 64, 64)
    assert ids.shape == (1, 128)
    assert ids[0, :61].tolist() == [*range(10, 70), 80]
    assert ids[0, 61:63].tolist() == [1, 2]  # the short tree fills the first bin's end
    assert not mask[0, 0, 61:63, :61].any()
    assert not mask[0, 0, :61, 61:].any()
    assert packed.branch.tolist() == [0] * 10 + [1] + [2] + [3] * 10 + [4]
    kept = packed.calls[0].keep[packed.row]
    assert (ids[0][kept[packed.branch == 3]] == torch.arange(59, 69)).all()


def test_pictures_lie_in_packed_order() -> None:
    """The longest tree is laid first, whatever the order of the items, and its pictures come first too."""
    short = path(1, PICTURE, 5, start=2, views=(view("s", 1),))
    long = path(1, PICTURE, *range(2, 40), start=30, views=(view("l", 1),))
    packed = pack(prefix_trees([[short], [long]], PICTURE), TEXT_ONLY, PICTURE)
    assert packed.calls[0].inputs["pixel_values"][:, 0].tolist() == [ord("l"), ord("s")]
    assert packed.branch.unique_consecutive().tolist() == [0, 1]


def test_pairs_only_gives_each_prompt_a_tree() -> None:
    box, answer = (1, 2), (1, 2, 3)
    group = [path(*box, 7, start=2), path(*answer, 8, start=3), path(*box, 9, start=2)]
    trees = prefix_trees([group], PICTURE, pairs_only=True)
    assert [tree.branches for tree in trees] == [[0, 2], [1]]
    packed = pack(trees, TEXT_ONLY, PICTURE)
    assert packed.target.tolist() == [7, 9, 8]
    assert packed.branch.tolist() == [0, 2, 1]


def test_rows_group_trees_by_their_pictures() -> None:
    family = FAMILIES["paligemma"]
    one = [path(1, PICTURE, 5, 6, start=2, views=(view(key, 1),)) for key in "ab"]
    two = path(1, PICTURE, PICTURE, 5, start=3, views=(view("a", 1), view("c", 1)))
    packed = pack(prefix_trees([[one[0], two], [one[1]]], PICTURE, pairs_only=True), family, PICTURE)
    assert [tuple(call.inputs["input_ids"].shape) for call in packed.calls] == [(2, 64), (1, 64)]
    assert packed.branch.tolist() == [0, 0, 2, 2, 1]
    assert packed.row.tolist() == [0, 1, 2, 3, 4]  # two columns of two rows, then one of the other call
    assert packed.calls[0].inputs["attention_mask"][0, 0, 0, :3].tolist() == [True, True, False]
