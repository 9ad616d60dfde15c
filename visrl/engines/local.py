"""The in-process engine: shared prefixes are computed once, for all samples and for both steps of a question.

Conversations that show the same picture form one tree and one row of the batch; its samples decode side by side in
that row, each seeing its own path only. The trees of the last batch are kept, so that step 2 of the same questions
computes nothing but its crops. Greedy texts equal those of the model's plain `generate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from visrl.box import Size
from visrl.codecs import Codec
from visrl.conversation import Conversation, PromptError
from visrl.engines.base import Completion, Sampling
from visrl.engines.decoding import Drawing, OnToken, Row, Text, draw_tokens
from visrl.engines.kv_tree import Field, Forest
from visrl.engines.recompute import RecomputedDrawing, try_out
from visrl.models.adapters import merge_adapter, read_adapter
from visrl.models.attention import attending_trees
from visrl.models.chain import adapter_chain
from visrl.models.encode import EncodedView, Encoder
from visrl.models.families import cache_argument, join_pictures
from visrl.models.load import load_encoder, load_model, note_dtype, reading
from visrl.models.modes import evaluating
from visrl.models.settings import ModelSettings

LONG_TEXT = 4096  # characters


class LocalEngine:
    """Draws texts from a model in this process. Not thread-safe: feed it from one thread.

    The model stays what it is to everybody else: attention and modes are an engine's own for the length of a call.
    """

    def __init__(self, model: torch.nn.Module, encoder: Encoder, *, name: str = "local", batch_size: int = 64) -> None:
        self.model = model
        self.encoder = encoder
        self.name = name
        self.batch_size = batch_size  # trees (questions) computed side by side
        self.prefilled_tokens = 0  # counted for benchmarks
        self._forest: Forest | None = None
        self._cache_argument = cache_argument(model)

    @staticmethod
    def load(
        path: str | Path,
        device: str | None = None,
        *,
        adapter: str | Path | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        settings: ModelSettings | None = None,
        trust_remote_code: bool = False,
    ) -> LocalEngine:
        """The engine of a checkpoint, with an adapter merged into it where one is given, once a first token was tried;
        on a GPU in bf16 where there is one.

        Raises:
            CheckpointError: nothing there that can be loaded.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        merged = [read_adapter(one) for one in adapter_chain(path, adapter)]
        encoder = load_encoder(path, settings, trust_remote_code=trust_remote_code)
        model = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
        note_dtype(path, dtype)
        with reading(path, f"the model cannot be put on {device}"):
            model = model.to(device).eval()
        for one in merged:
            model = merge_adapter(model, one, path).eval()
        try_out(model, encoder, path)
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

    def generate(self, rows: Sequence[Row], on_token: OnToken | None = None) -> list[Completion]:
        """One completion per row. `on_token(row, read)` is told of every token, `read()` being the row's text so far,
        and stops the row by False.
        """
        done: dict[int, Completion] = {}
        groups = list(by_picture(dict(enumerate(rows))).values())
        long = [members for members in groups if any(_is_long(rows[n].conversation) for n in members)]
        short = [members for members in groups if members not in long]
        batches = [short[start : start + self.batch_size] for start in range(0, len(short), self.batch_size)]
        with evaluating(self.model):
            for batch in [*batches, *([members] for members in long)]:
                numbers = [n for members in batch for n in members]
                drawing = self.begin(on_token)
                done |= drawing.add({n: rows[n] for n in numbers})
                while len(drawing):
                    done |= drawing.step()
        return [done[n] for n in range(len(rows))]

    def begin(self, on_token: OnToken | None = None) -> Drawing:
        """An empty drawing, which rows may join and leave at any step; one of an engine is in use at a time."""
        if self.encoder.family.plain:
            return CachedDrawing(self, on_token)
        return RecomputedDrawing(self.model, self.encoder, on_token)

    def prepare(self, conversation: Conversation) -> list[EncodedView]:
        """The pictures of a conversation, ready for the vision tower; may run in another thread than `generate`."""
        return self.encoder.encode_views(conversation.views, alone=len(conversation.views) == 1)

    def keep(self, prepared: Iterable[EncodedView]) -> None:
        """Have what `prepare` gave at hand for the next `generate`."""
        self.encoder.keep(prepared)

    def keep_trees(self, forest: Forest) -> None:
        """Have the trees of a drawing that has ended at hand: rows of the same pictures compute only what is new."""
        self._forest = forest

    def forget(self) -> None:
        """Drop the kept trees: the model's weights have changed, memory is wanted, or other questions begin."""
        self._forest = None

    # --- what a drawing asks for

    def prefill(
        self, groups: dict[str, list[int]], texts: Mapping[int, Text]
    ) -> tuple[Forest, dict[int, np.ndarray], dict[int, torch.Tensor]]:
        """Compute what prompts add to the kept trees; for every row, the slots of its prompt and its next logits."""
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
                path = texts[number].prompt
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
        out = self.forward(ids, positions, mask, forest.cache, views, columns)
        forest.length += width
        rank = {column: number for number, column in enumerate(columns)}
        return {(b, place): out[b, rank[place - before[b]]] for b, place in keep}

    def forward(
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
        with attending_trees(self.model):
            return self.model(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask)[:, None].to(device),
                position_ids=position_ids[0] if len(position_ids) == 1 else position_ids,
                use_cache=True,
                logits_to_keep=torch.tensor(columns, device=device),
                **{self._cache_argument: cache},
                **pictures,
            ).logits.float()


def _is_long(conversation: Conversation) -> bool:
    """Whether a conversation is drawn by itself: every mask of a batch is as large as that of its longest text."""
    return sum(len(message.text) for message in conversation.messages) > LONG_TEXT


class CachedDrawing(Drawing):
    """Texts whose keys and values are kept; all samples of a picture are drawn side by side in one row of the cache."""

    def __init__(self, engine: LocalEngine, on_token: OnToken | None = None) -> None:
        super().__init__(engine.encoder, on_token)
        self.engine = engine
        self._field: Field | None = None
        self._forest: Forest | None = None  # of the field, where no other has joined it

    @torch.inference_mode()
    def add(self, rows: Mapping[int, Row]) -> dict[int, Completion]:
        for alone in (True, False):
            talks = [row.conversation for row in rows.values() if (len(row.conversation.views) == 1) == alone]
            with suppress(PromptError):  # `read` makes each ready by itself then, and says which cannot be
                self.encoder.encode_views([view for talk in talks for view in talk.views], alone=alone)
        texts, failed = self.read(rows)
        if not texts:
            return failed
        groups = by_picture({n: text.row for n, text in texts.items()})
        forest, places, logits = self.engine.prefill(groups, texts)
        field = Field.of(groups, forest, places)
        self.texts |= texts
        ended = failed | self._draw(field, torch.stack([logits[n] for n in field.numbers]))
        if self._field is None:
            self._field, self._forest = field, forest
        elif field.numbers:
            self._field.join(field)
            self._forest = None
        self._end()
        return ended

    @torch.inference_mode()
    def step(self) -> dict[int, Completion]:
        field = self._field
        if field is None:
            return {}
        field.close_up()
        field.grow()
        columns = list(range(field.grid.shape[1]))
        logits = self.engine.forward(field.tokens, field.positions, field.visible, field.cache, [], columns)
        field.next_position = field.next_position + 1
        ended = self._draw(field, logits[torch.from_numpy(field.alive).to(logits.device)])
        self._end()
        return ended

    def _draw(self, field: Field, logits: torch.Tensor) -> dict[int, Completion]:
        """Draw a token of each text in the field from `logits` [texts, vocabulary]; those that have ended with it."""
        numbers = field.numbers
        tokens = dict(zip(numbers, draw_tokens(logits, [self.texts[n] for n in numbers]), strict=True))
        ended = self.take(tokens)
        field.put({n: token for n, token in tokens.items() if n not in ended})
        return ended

    def _end(self) -> None:
        """Once all texts have ended, leave the trees of their prompts to whatever comes next."""
        if len(self):
            return
        if self._forest is not None:
            self._forest.cache.crop(self._forest.length - self._forest.cache.get_seq_length())
            self.engine.keep_trees(self._forest)
        self._field = self._forest = None


def by_picture(rows: Mapping[int, Row]) -> dict[str, list[int]]:
    """The numbers of rows, together where they show the same picture first."""
    groups: dict[str, list[int]] = {}
    for number, row in rows.items():
        views = row.conversation.views
        groups.setdefault(views[0].key if views else f"row {number}", []).append(number)
    return groups
