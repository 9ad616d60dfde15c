"""The one way from token paths to a batch: as prefix trees, or row by row where a model takes none."""

from __future__ import annotations

from collections.abc import Sequence

from visrl.models.encode import Encoder, TokenPath
from visrl.models.plain_encoder import PlainEncoder
from visrl.packing.pack import BUCKET, PackedBatch, pack
from visrl.packing.rows import pack_rows
from visrl.packing.tree import group_by_image, prefix_trees


def lay_out(
    items: Sequence[Sequence[TokenPath]],
    encoder: Encoder,
    *,
    bin_length: int = 512,
    bucket: int = BUCKET,
    ends: bool = False,
) -> tuple[PackedBatch, list[int]]:
    """The paths of every item in one batch, and the numbers of the items in the order in which their branches lie: in
    trees those that show one image first lie together. `bin_length`, `bucket` and `ends` are `pack`'s.

    Raises:
        ValueError: as `pack`.
    """
    if isinstance(encoder, PlainEncoder):
        return pack_rows([path for paths in items for path in paths], encoder, ends=ends), list(range(len(items)))
    groups = list(group_by_image({n: paths[0].views for n, paths in enumerate(items)}).values())
    family, image_token = encoder.family, encoder.image_token_id
    trees = prefix_trees(
        [[path for number in members for path in items[number]] for members in groups],
        image_token,
        pairs_only=family.shares == "pairs",
    )
    packed = pack(trees, family, image_token, bin_length=bin_length, bucket=bucket, ends=ends)
    return packed, [number for members in groups for number in members]
