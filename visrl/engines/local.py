"""The in-process engine: shared prefixes are computed once, for all samples and for both steps of a question.

Conversations that show the same picture form one tree and one row of the batch; its samples decode side by side in
that row, each seeing its own path only. The trees of the last batch are kept, so that step 2 of the same questions
computes nothing but its crops. Greedy texts equal those of the model's plain `generate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import DynamicCache

from visrl.box import Size
from visrl.codecs import Codec
from visrl.conversation import Completion, Conversation, Sampling
from visrl.engines.forest import Field, Forest
from visrl.models.attention import use_tree_attention
from visrl.models.encode import EncodedView, Encoder, PromptError, TokenPath
from visrl.models.families import join_pictures
from visrl.models.load import load_encoder, load_model
from visrl.models.settings import ModelSettings

ReadText = Callable[[], str]
OnToken = Callable[[int, ReadText], bool]  # told the row and how to read its text so far; False stops the row


@dataclass(frozen=True, slots=True)
class Row:
    """One sample to draw: a conversation, how to draw it, and its seed."""

    conversation: Conversation
    sampling: Sampling
    seed: int


class LocalEngine:
    """Draws texts from a model in this process. Not thread-safe: feed it from one thread."""

    def __init__(self, model: torch.nn.Module, encoder: Encoder, *, name: str = "local", batch_size: int = 64) -> None:
        self.model = model
        self.encoder = encoder
        self.name = name
        self.batch_size = batch_size  # trees (questions) computed side by side
        self.prefilled_tokens = 0  # counted for benchmarks
        self._forest: Forest | None = None
        use_tree_attention(model)

    @staticmethod
    def load(
        path: str | Path,
        device: str | None = None,
        *,
        adapter: str | Path | None = None,
        dtype: torch.dtype | None = None,
        settings: ModelSettings | None = None,
        trust_remote_code: bool = False,
    ) -> LocalEngine:
        """The engine of a checkpoint, on a GPU in bf16 where there is one.

        Raises:
            CheckpointError: nothing there that can be loaded.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        encoder = load_encoder(path, settings, trust_remote_code=trust_remote_code)
        model = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code).to(device).eval()
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
        return LocalEngine(model, encoder, name=str(path))

    @property
    def codec(self) -> Codec:
        return self.encoder.codec

    def processed_size(self, size: Size, is_crop: bool = False) -> Size:
        """Width and height that the processor gives a picture of `size`."""
        return self.encoder.processed_size(size, is_crop)

    def complete(
        self, conversations: Sequence[Conversation], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """One completion per seed (see `visrl.conversation.Engine`)."""
        rows = [
            Row(conversation, sampling, seed)
            for conversation, own in zip(conversations, seeds, strict=True)
            for seed in own
        ]
        texts = iter(self.generate(rows))
        return [[next(texts) for _ in own] for own in seeds]

    @torch.inference_mode()
    def generate(self, rows: Sequence[Row], on_token: OnToken | None = None) -> list[Completion]:
        """One completion per row. `on_token(row, read)` is told of every token, `read()` being the row's text so far,
        and stops the row by False.
        """
        training = self.model.training
        self.model.eval()
        done: list[Completion | None] = [None] * len(rows)
        groups: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            views = row.conversation.views
            groups.setdefault(views[0].key if views else f"row {number}", []).append(number)
        try:
            for keys in _batches(list(groups), self.batch_size):
                members = {key: groups[key] for key in keys}
                if self.encoder.family.plain:
                    self._generate_batch(rows, members, done, on_token)
                else:
                    from visrl.engines.recompute import recompute_batch

                    recompute_batch(self, rows, members, done, on_token)
        finally:
            self.model.train(training)
        return [completion or Completion(None, finish_reason="error", error="no text") for completion in done]

    def prepare(self, conversation: Conversation) -> list[EncodedView]:
        """The pictures of a conversation, ready for the vision tower; may run in another thread than `generate`."""
        return self.encoder.encode_views(conversation.views, alone=len(conversation.views) == 1)

    def keep(self, prepared: Iterable[EncodedView]) -> None:
        """Have what `prepare` gave at hand for the next `generate`."""
        self.encoder.keep(prepared)

    def forget(self) -> None:
        """Drop the kept trees: the model's weights have changed, memory is wanted, or other questions begin."""
        self._forest = None

    # --- one batch

    def _generate_batch(
        self, rows: Sequence[Row], groups: dict[str, list[int]], done: list[Completion | None], on_token: OnToken | None
    ) -> None:
        paths: dict[int, TokenPath] = {}
        known: dict[int, TokenPath] = {}
        wanted = {id(rows[n].conversation): rows[n].conversation for members in groups.values() for n in members}
        for alone in (True, False):
            talks = [talk for talk in wanted.values() if (len(talk.views) == 1) == alone]
            self.encoder.encode_views([view for talk in talks for view in talk.views], alone=alone)
        for members in groups.values():
            for number in members:
                talk = rows[number].conversation
                try:
                    if id(talk) not in known:
                        known[id(talk)] = self.encoder.encode(talk, [None])[0]
                    paths[number] = known[id(talk)]
                except PromptError as error:
                    done[number] = Completion(None, finish_reason="error", error=str(error))
        groups = {key: [n for n in members if n in paths] for key, members in groups.items()}
        groups = {key: members for key, members in groups.items() if members}
        if not groups:
            return
        forest, places, logits = self._prefill(groups, paths)
        self._decode(rows, groups, forest, places, logits, done, on_token)
        forest.cache.crop(-(forest.cache.get_seq_length() - forest.length))
        self._forest = forest

    def _prefill(
        self, groups: dict[str, list[int]], paths: dict[int, TokenPath]
    ) -> tuple[Forest, dict[int, np.ndarray], dict[int, torch.Tensor]]:
        """Compute what the paths add to the kept trees; for every row, the slots of its path and its next logits."""
        forest = self._forest
        if forest is None or list(forest.trees) != list(groups):
            forest = Forest.of(groups)
        self._forest = None  # a failure below must not leave half a forest behind
        before = [tree.size for tree in forest.trees.values()]
        seen_views = [len(tree.views) for tree in forest.trees.values()]
        home: dict[int, tuple[int, int]] = {}  # row → (tree, number of its path there)
        for b, (key, members) in enumerate(groups.items()):
            tree, added = forest.trees[key], {}
            for number in members:
                path = paths[number]
                if id(path) not in added:
                    added[id(path)] = len(tree.paths)
                    tree.add(path, self.encoder.image_token_id, recompute_last=True)
                home[number] = (b, added[id(path)])
        trees = list(forest.trees.values())
        keep = {(b, int(trees[b].paths[p][0][-1])) for b, p in home.values()}
        logits = self._append(forest, before, seen_views, keep)
        places = {n: forest.slots[b][trees[b].paths[p][0]] for n, (b, p) in home.items()}
        heads = {n: logits[b, int(trees[b].paths[p][0][-1])] for n, (b, p) in home.items()}
        return forest, places, heads

    def _append(
        self, forest: Forest, before: list[int], seen_views: list[int], keep: set[tuple[int, int]]
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Run the model over every tree's new tokens; logits at the (tree, place) pairs of `keep`."""
        trees = list(forest.trees.values())
        width = max(tree.size - old for tree, old in zip(trees, before, strict=True))
        start = forest.length
        ids = np.full((len(trees), width), self.encoder.tokenizer.pad_token_id or 0, dtype=np.int64)
        depth = trees[0].positions[0].shape[0]
        positions = np.zeros((depth, len(trees), width), dtype=np.int64)
        mask = np.zeros((len(trees), width, start + width), dtype=bool)
        mask[:, np.arange(width), start + np.arange(width)] = True
        views: list[EncodedView] = []
        for b, (tree, old) in enumerate(zip(trees, before, strict=True)):
            fresh = tree.size - old
            forest.slots[b] = np.concatenate([forest.slots[b], start + np.arange(fresh)])
            if fresh:
                ids[b, :fresh] = np.concatenate(tree.ids)[old:]
                positions[:, b, :fresh] = np.concatenate(tree.positions, axis=1)[:, old:]
            for first, last, ancestors in tree.segments:
                if first >= old:
                    own = slice(first - old, last - old)
                    mask[b, own, forest.slots[b][ancestors]] = True
                    mask[b, own, start + first - old : start + last - old] |= np.tri(last - first, dtype=bool)
            views += tree.views[seen_views[b] :]
            self.prefilled_tokens += fresh
        columns = sorted({place - before[b] for b, place in keep})
        out = self._forward(ids, positions, mask, forest.cache, views, columns)
        forest.length += width
        rank = {column: number for number, column in enumerate(columns)}
        return {(b, place): out[b, rank[place - before[b]]] for b, place in keep}

    def _decode(
        self,
        rows: Sequence[Row],
        groups: dict[str, list[int]],
        forest: Forest,
        places: dict[int, np.ndarray],
        logits: dict[int, torch.Tensor],
        done: list[Completion | None],
        on_token: OnToken | None,
    ) -> None:
        """Draw token after token, all samples of a tree side by side in its row."""
        field = Field.of(groups, forest, places)
        draws = {n: Draw(rows[n]) for n in places}
        head = next(iter(logits.values()))
        now = torch.zeros(*field.grid.shape, len(head), dtype=head.dtype, device=head.device)
        for (b, j), n in np.ndenumerate(field.grid):
            if n >= 0:
                now[b, j] = logits[int(n)]
        texts: dict[int, list[int]] = {n: [] for n in draws}
        pad = self.encoder.tokenizer.pad_token_id or 0
        depth = next(iter(forest.trees.values())).positions[0].shape[0]
        for step in itertools.count():
            chosen = draw_tokens(now, field.grid, field.alive, draws, step)
            for b, j in zip(*np.nonzero(field.alive), strict=True):
                n, token = int(field.grid[b, j]), int(chosen[b, j])
                reason = self.take(rows[n], texts[n], token, n, on_token)
                if reason:
                    field.alive[b, j] = False
                    text = self.encoder.decode(texts[n])
                    done[n] = Completion(text, len(texts[n]), reason, prompt_tokens=len(places[n]))
            if not field.alive.any():
                return
            ids = field.close_up(np.where(field.alive, chosen, pad))
            field.grow()
            positions = np.broadcast_to(field.next_position + step, (depth, *ids.shape))
            now = self._forward(ids, positions, field.visible, field.cache, [], list(range(ids.shape[1])))

    def take(
        self, row: Row, text: list[int], token: int, number: int, on_token: OnToken | None
    ) -> Literal["stop", "length"] | None:
        """Add a drawn token to a row's text; why the row ends here, or None where it goes on."""
        if token == self.encoder.end_id:
            return "stop"
        text.append(token)
        if on_token is not None and not on_token(number, partial(self.encoder.decode, text)):
            return "stop"
        return "length" if len(text) >= row.sampling.max_tokens else None

    def _forward(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        mask: np.ndarray,
        cache: DynamicCache,
        views: Sequence[EncodedView],
        columns: list[int],
    ) -> torch.Tensor:
        """Logits [trees, columns, vocabulary] in fp32; `mask` is [trees, queries, slots]."""
        device = next(self.model.parameters()).device
        position_ids = torch.from_numpy(np.ascontiguousarray(positions)).to(device)
        pictures = {}
        if views:
            joined = join_pictures(self.encoder.family, [view.pictures for view in views])
            pictures = {name: tensor.to(device) for name, tensor in joined.items()}
        return self.model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask)[:, None].to(device),
            position_ids=position_ids[0] if len(position_ids) == 1 else position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(columns, device=device),
            **pictures,
        ).logits.float()


class Draw:
    """The random numbers of one sample: one per token, the same whatever else is in the batch."""

    def __init__(self, row: Row) -> None:
        self.temperature = row.sampling.temperature
        self.top_p = row.sampling.top_p
        self.uniform = (
            np.random.default_rng(row.seed).random(row.sampling.max_tokens + 1) if self.temperature > 0 else None
        )


def draw_tokens(
    logits: torch.Tensor, grid: np.ndarray, alive: np.ndarray, draws: dict[int, Draw], step: int
) -> np.ndarray:
    """The next token of every fork, [trees, forks]: the arg-max, or an inverse-CDF draw from the nucleus."""
    chosen = logits.argmax(-1).cpu().numpy()
    hot = [(b, j) for b, j in zip(*np.nonzero(alive), strict=True) if draws[int(grid[b, j])].uniform is not None]
    if not hot:
        return chosen
    mine = [draws[int(grid[b, j])] for b, j in hot]
    index = torch.tensor(hot, device=logits.device)
    temperature = torch.tensor([draw.temperature for draw in mine], device=logits.device)
    probabilities = torch.softmax(logits[index[:, 0], index[:, 1]] / temperature[:, None], dim=-1).double()
    top_p = torch.tensor([draw.top_p for draw in mine], device=logits.device, dtype=torch.float64)
    if (top_p < 1).any():
        probabilities = _nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(-1)
    uniform = torch.tensor([draw.uniform[step] for draw in mine], device=logits.device, dtype=torch.float64)  # type: ignore[index]
    found = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    drawn = found.clamp(max=logits.shape[-1] - 1).cpu().numpy()
    for (b, j), token in zip(hot, drawn, strict=True):
        chosen[b, j] = token
    return chosen


def _nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """`probabilities` [rows, vocabulary] with everything outside the smallest set of mass ≥ top_p set to 0."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p[:, None]
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0.0))


def _batches(keys: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
