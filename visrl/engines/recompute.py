"""Generation for families whose tokens see more than what came before them: every token computes its whole text again.

Slow, and exact by the same packing that trains: nothing here knows a family. Samples of one prompt share it within a
step. Models of these families that are to be fast are served by vLLM or SGLang.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from visrl.conversation import Completion
from visrl.engines.local import Draw, OnToken, Row, draw_tokens
from visrl.models.encode import PromptError, TokenPath
from visrl.train.forward import kept_logits
from visrl.train.pack import TIGHT_BUCKET, pack
from visrl.train.tree import grow

if TYPE_CHECKING:
    from visrl.engines.local import LocalEngine


def recompute_batch(
    engine: LocalEngine,
    rows: Sequence[Row],
    groups: dict[str, list[int]],
    done: list[Completion | None],
    on_token: OnToken | None,
) -> None:
    """Draw the texts of all rows in `groups` into `done`; the same contract as the engine's own batch."""
    paths: dict[int, TokenPath] = {}
    for number in (number for members in groups.values() for number in members):
        try:
            paths[number] = engine.encoder.encode(rows[number].conversation, [None])[0]
        except PromptError as error:
            done[number] = Completion(None, finish_reason="error", error=str(error))
    draws = {number: Draw(rows[number]) for number in paths}
    texts: dict[int, list[int]] = {number: [] for number in paths}
    alive = sorted(paths)
    step = 0
    while alive:
        now = next_logits(engine, [_longer(engine, paths[number], texts[number]) for number in alive])
        grid = np.array(alive)[:, None]
        chosen = draw_tokens(now[:, None], grid, np.ones_like(grid, dtype=bool), draws, step)[:, 0]
        for number, token in zip(list(alive), chosen.tolist(), strict=True):
            reason = engine.take(rows[number], texts[number], token, number, on_token)
            if reason:
                alive.remove(number)
                text = engine.encoder.decode(texts[number])
                count = len(paths[number].ids)
                done[number] = Completion(text, len(texts[number]), reason, prompt_tokens=count)
        step += 1


def next_logits(engine: LocalEngine, paths: Sequence[TokenPath]) -> torch.Tensor:
    """Logits [paths, vocabulary], in fp32, of what follows each path; its last token stands for what follows."""
    encoder = engine.encoder
    by_picture: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        by_picture.setdefault(path.views[0].key if path.views else f"path {number}", []).append(number)
    order = [number for members in by_picture.values() for number in members]
    groups = [[paths[number] for number in members] for members in by_picture.values()]
    trees = grow(groups, encoder.image_token_id, pairs_only=encoder.family.shares == "pairs")
    packed = pack(trees, encoder.family, encoder.image_token_id, bucket=TIGHT_BUCKET)
    packed = packed.to(next(engine.model.parameters()).device)
    last = torch.empty(len(paths), dtype=torch.long, device=packed.row.device)
    # Of the responses' rows in order, a later one of a branch takes an earlier one's place.
    for row, branch in zip(packed.row, packed.branch.tolist(), strict=True):
        last[order[branch]] = row
    return kept_logits(engine.model, packed)[last].float()


def _longer(engine: LocalEngine, prompt: TokenPath, text: list[int]) -> TokenPath:
    """`prompt` with the tokens drawn so far, and one more for what follows."""
    ids = np.concatenate([prompt.ids, np.array([*text, engine.encoder.end_id], dtype=np.int64)])
    grids = [view.grid for view in prompt.views]
    positions = engine.encoder.family.positions(ids, engine.encoder.image_token_id, grids)
    return replace(prompt, ids=ids, positions=positions, start=len(prompt.ids))
