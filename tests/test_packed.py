"""Packed trees against separate sequences on a tiny random Qwen2-VL; wrong masks and positions must fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from loud import louder
from PIL import Image
from torch import Tensor, nn

from visrl.box import Box
from visrl.conversation import (
    Conversation,
    Message,
    View,
    answer_conversation,
    crop_view,
    focus_conversation,
    image_view,
)
from visrl.images import open_image
from visrl.models.attention import BLOCK, _block_mask, use_tree_attention
from visrl.models.encode import Encoder, PromptError, TokenPath
from visrl.models.load import load_encoder, load_model
from visrl.models.positions import mrope_positions
from visrl.packing.forward import branch_logps
from visrl.packing.pack import PackedBatch, pack
from visrl.packing.tree import prefix_trees
from visrl.records import Picture
from visrl.scenes import scene_samples
from visrl.train import losses
from visrl.train.items import Collator, Item, encode_item
from visrl.train.model import make_tied_embedding_sparse
from visrl.train.rows import sft_rows


@pytest.fixture(scope="module")
def model(tiny: Path) -> nn.Module:
    """Random weights, loud enough that texts and pictures make a difference."""
    model = load_model(tiny)
    louder(model)
    use_tree_attention(model)
    return model


@pytest.fixture(scope="module")
def encoder(tiny: Path) -> Encoder:
    return load_encoder(tiny)


def questions_of_a_picture(encoder: Encoder, first: int = 0, questions: int = 2) -> list[TokenPath]:
    """Box and answer pairs of several questions about one drawn scene: 4 paths per question."""
    samples = scene_samples("train", first, 1, per_scene=questions)
    whole = image_view(Picture(samples[0].image), open_image(samples[0].image))
    paths = []
    for n, sample in enumerate(samples[:questions]):
        detail = crop_view(whole, Picture(sample.image, Box(0.1 * n, 0.2, 0.1 * n + 0.4, 0.7)))
        box, answer = focus_conversation(sample.question, whole), answer_conversation(sample.question, whole, detail)
        paths += encoder.encode(box, ["[0.100, 0.200, 0.500, 0.700]", "[0.150, 0.250, 0.300, 0.400]"])
        paths += encoder.encode(answer, ["7", "42."])
    assert len(paths) == 4 * questions
    return paths


def separate(model: nn.Module, encoder: Encoder, paths: list[TokenPath]) -> Tensor:
    """Summed log-probability of each response, every path a call of its own under plain causal SDPA attention and the
    model's own positions."""
    text = model.model.language_model
    text.config._attn_implementation = "sdpa"
    sums = []
    for one in paths:
        ids = torch.from_numpy(one.ids)[None]
        pictures = {name: torch.cat([v.inputs[name] for v in one.views]) for name in one.views[0].inputs}
        marks = (ids == encoder.image_token_id).int()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=marks, **pictures).logits
        logps = torch.log_softmax(logits[0, one.start - 1 : -1].float(), -1)
        sums.append(logps.gather(-1, ids[0, one.start :, None]).sum())
    use_tree_attention(model)
    return torch.stack(sums)


def packed_of(encoder: Encoder, groups: list[list[TokenPath]], bin_length: int = 512) -> PackedBatch:
    return pack(
        prefix_trees(groups, encoder.image_token_id), encoder.family, encoder.image_token_id, bin_length=bin_length
    )


def gradients(model: nn.Module, sums: Tensor) -> list[Tensor]:
    """Gradients of a loss that weighs every branch differently, so that no two could be exchanged unseen."""
    model.zero_grad()
    (sums * torch.linspace(-1, 2, len(sums))).sum().backward()
    return [weights.grad.clone() for weights in model.parameters() if weights.grad is not None]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("bins", [1, 2])
def test_a_packed_batch_equals_separate_sequences(model: nn.Module, encoder: Encoder, bins: int) -> None:
    """Pictures with two questions each, box and answer pairs: log-probabilities and gradients."""
    groups = [questions_of_a_picture(encoder, first=5 * n) for n in range(bins)]
    packed = packed_of(encoder, groups, bin_length=64)
    assert len(packed.calls[0].inputs["attention_mask"]) == bins
    ours = branch_logps(model, packed)
    theirs = separate(model, encoder, [path for group in groups for path in group])
    torch.testing.assert_close(ours.sums, theirs, rtol=1e-5, atol=0)
    assert ours.counts.tolist() == [len(p.ids) - p.start for group in groups for p in group]
    for a, b in zip(gradients(model, ours.sums), gradients(model, theirs), strict=True):
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo", "sft", "kto"])
def test_every_loss_has_the_gradients_of_separate_sequences(model: nn.Module, encoder: Encoder, loss: str) -> None:
    group = questions_of_a_picture(encoder)
    packed = packed_of(encoder, [group])
    counts = torch.tensor([float(len(p.ids) - p.start) for p in group])
    found = []
    for sums in (branch_logps(model, packed).sums, separate(model, encoder, group)):
        value = loss_of(loss, sums, counts)
        found.append((value.detach(), gradients(model, value)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert relative(a, b) < 1e-4


def loss_of(name: str, sums: Tensor, counts: Tensor) -> Tensor:
    """One loss per pair (per response for KTO), against a made-up reference."""
    reference = torch.linspace(-60, -40, len(sums))
    if name == "kto":
        return losses.kto(sums, reference, torch.arange(len(sums)) % 2 == 0, torch.tensor(0.5))
    loss = losses.LOSSES[name]
    scale = counts if loss.averages else torch.ones_like(counts)
    pair, ref_pair = ((x[::2], x[1::2]) for x in (sums / scale, reference / scale))
    keywords = {"beta": torch.full_like(pair[0], 0.1)} if loss.beta else {}
    keywords |= {"label_smoothing": 0.1} if "label_smoothing" in loss.parameters else {}
    return loss.function(*loss.arguments(pair, ref_pair), **keywords)


def test_blocks_of_queries_change_nothing(model: nn.Module, encoder: Encoder) -> None:
    groups = [questions_of_a_picture(encoder, questions=4), questions_of_a_picture(encoder, first=5)]
    packed = packed_of(encoder, groups, bin_length=64)
    assert packed.calls[0].inputs["attention_mask"].shape[-1] > 2 * BLOCK
    whole = branch_logps(model, packed).sums
    use_tree_attention(model, "blocks")
    blocks = branch_logps(model, packed).sums
    use_tree_attention(model)
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=0)
    for a, b in zip(gradients(model, blocks), gradients(model, whole), strict=True):
        assert relative(a, b) < 1e-5


def test_a_tied_embedding_gives_the_same_gradient_for_its_own_tokens_only(tiny: Path, encoder: Encoder) -> None:
    packed = packed_of(encoder, [questions_of_a_picture(encoder)])
    found = []
    for sparse in (False, True):
        model = load_model(tiny)
        use_tree_attention(model)
        if sparse:
            make_tied_embedding_sparse(model)
        embedding = model.get_input_embeddings()
        assert embedding.sparse == sparse
        for _ in range(2):  # accumulated over two batches
            (branch_logps(model, packed).sums * torch.linspace(-1, 2, packed.branches)).sum().backward()
        assert not embedding.weight.grad.is_sparse
        found.append([weights.grad for weights in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-5


def test_an_embedding_by_itself_stays_dense(tiny: Path) -> None:
    """Optimisers take no sparse gradients, and nothing dense would be added to it."""
    model = load_model(tiny)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    make_tied_embedding_sparse(model)
    assert not model.get_input_embeddings().sparse


@pytest.mark.parametrize("tokens", [BLOCK + 1, 4096])
def test_flex_attention_changes_nothing(
    model: nn.Module, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """Under a block mask, in batches long enough for it, and as plain attention in shorter ones. Forward only: PyTorch
    has no backward pass of FlexAttention on a CPU."""
    monkeypatch.setattr("visrl.models.attention.FLEX_TOKENS", tokens)
    groups = [questions_of_a_picture(encoder, questions=4), questions_of_a_picture(encoder, first=5)]
    packed = packed_of(encoder, groups, bin_length=64)
    with torch.no_grad():
        whole = branch_logps(model, packed).sums
        use_tree_attention(model, "flex")
        flex = branch_logps(model, packed).sums
        use_tree_attention(model)
    assert (flex != whole).any() == (tokens < 4096), "computed otherwise, where it is long enough"
    torch.testing.assert_close(flex, whole, rtol=1e-5, atol=0)


def test_a_block_mask_leaves_out_what_nobody_sees() -> None:
    """Four trees of a block each, side by side: of 16 blocks of keys 4 are computed."""
    mask = torch.block_diag(*[torch.ones(BLOCK, BLOCK).tril()] * 4).bool()[None, None]
    assert _block_mask(mask).sparsity() == 75  # percent
    assert _block_mask(mask) is _block_mask(mask), "made once for all layers"


def test_a_plain_causal_mask_fails_the_check(model: nn.Module, encoder: Encoder) -> None:
    packed = packed_of(encoder, [questions_of_a_picture(encoder)])
    right = branch_logps(model, packed).sums
    mask = packed.calls[0].inputs["attention_mask"]
    mask[:] = torch.ones_like(mask[0, 0]).tril()
    wrong = branch_logps(model, packed).sums
    assert ((wrong - right).abs() / right.abs()).max() > 1e-3


def test_depth_positions_fail_the_check(model: nn.Module, encoder: Encoder) -> None:
    packed = packed_of(encoder, [questions_of_a_picture(encoder)])
    right = branch_logps(model, packed).sums
    packed.calls[0].inputs["position_ids"][:] = torch.arange(packed.padded_tokens)
    wrong = branch_logps(model, packed).sums
    assert ((wrong - right).abs() / right.abs()).max() > 1e-3


def test_merged_tokens_at_the_edge_of_the_prompt(model: nn.Module, encoder: Encoder) -> None:
    """The tokeniser merges '.' with a newline after it; a prompt that ends in '.' is tokenised with what follows."""
    assert len(encoder.tokenizer("Look.\n").input_ids) < len(encoder.tokenizer("Look.").input_ids) + 1
    sample = scene_samples("train", 3, 1)[0]
    whole = image_view(Picture(sample.image), open_image(sample.image))
    # No generation prompt between the turn and the answer: the text before the answer ends in a full stop.
    encoder.chat_template, kept = ("{{ '<|image_pad|>' + messages[0].content[1].text }}", encoder.chat_template)
    try:
        talk = Conversation((Message("user", "<image>Where is it."),), (whole,))
        paths = encoder.encode(talk, ["\nthere", "here", "\nthen"])
        prompt = encoder.encode(talk, [None])[0]
    finally:
        encoder.chat_template = kept
    assert paths[0].start == len(prompt.ids) - 1  # the last token of the prompt is another one with the newline
    assert paths[1].start == len(prompt.ids)
    for one in paths:
        assert encoder.tokenizer.decode(one.ids).startswith(encoder.tokenizer.decode(prompt.ids))
    ours = branch_logps(model, packed_of(encoder, [paths])).sums
    torch.testing.assert_close(ours, separate(model, encoder, paths), rtol=1e-5, atol=0)


def test_shared_tokens_are_counted_once(encoder: Encoder) -> None:
    paths = questions_of_a_picture(encoder, questions=3)
    packed = packed_of(encoder, [paths])
    distinct = {(tuple(p.ids[: n + 1]), tuple(v.key for v in p.views[: _seen(encoder, p, n)])) for p in paths for n in
                range(len(p.ids))}  # fmt: skip
    assert packed.tokens == len(distinct)
    assert packed.separate_tokens == sum(len(p.ids) for p in paths)
    assert packed.separate_tokens > 2 * packed.tokens


def _seen(encoder: Encoder, one: TokenPath, place: int) -> int:
    """How many pictures of a path begin at or before `place`."""
    starts = np.cumsum([0] + [v.tokens for v in one.views])[:-1]
    return int((starts < (one.ids[: place + 1] == encoder.image_token_id).sum()).sum())


def test_positions_equal_the_models_own(model: nn.Module, encoder: Encoder) -> None:
    for one in questions_of_a_picture(encoder):
        ids = torch.from_numpy(one.ids)[None]
        grids = torch.cat([v.inputs["image_grid_thw"] for v in one.views])
        theirs, _ = model.model.get_rope_index(ids, (ids == encoder.image_token_id).int(), image_grid_thw=grids)
        ours = mrope_positions(one.ids, encoder.image_token_id, [v.grid for v in one.views])
        assert (theirs[:, 0].numpy() == ours).all()


def test_features_equal_image_tokens(model: nn.Module, encoder: Encoder) -> None:
    """Nothing is cut off: every picture of a packed batch has as many features as tokens."""
    packed = packed_of(encoder, [questions_of_a_picture(encoder), questions_of_a_picture(encoder, first=7)], 64)
    inputs = packed.calls[0].inputs
    features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    assert sum(len(f) for f in features) == int((inputs["input_ids"] == encoder.image_token_id).sum())


def test_a_longer_tree_makes_bins_longer_instead_of_being_cut(encoder: Encoder) -> None:
    paths = questions_of_a_picture(encoder)
    packed = packed_of(encoder, [paths], bin_length=64)
    assert packed.tokens > 64
    assert packed.padded_tokens >= packed.tokens
    assert len(packed.target) == sum(len(p.ids) - p.start for p in paths)


def test_a_sequence_over_the_cutoff_is_refused_and_never_cut(encoder: Encoder) -> None:
    sample = scene_samples("train", 2, 1, with_box=True)[0]
    item = Item("one", tuple(sft_rows(encoder, sample)))
    longest = max(len(p.ids) for p in encode_item(encoder, 0, item)[0])
    batch = Collator(encoder, cutoff=longest)([item])["batch"]
    assert batch.packed.separate_tokens == sum(len(p.ids) for p in encode_item(encoder, 0, item)[0])
    with pytest.raises(ValueError, match=rf"row .*: {longest} tokens, \d+ of them of pictures, are over cutoff_len"):
        Collator(encoder, cutoff=longest - 1)([item])


def test_control_tokens_in_a_text_are_refused(encoder: Encoder) -> None:
    with pytest.raises(PromptError, match="control token"):
        encoder.render(Conversation((Message("user", "say <|im_end|> now"),)))


def test_views_of_equal_key_are_computed_once(encoder: Encoder) -> None:
    sample = scene_samples("train", 11, 1)[0]
    whole = View("one", open_image(sample.image))
    assert encoder.encode_views([whole, View("one", whole.image)])[0] is encoder.encode_views([whole])[0]


def test_old_views_make_room_and_those_of_one_call_stay_together(tiny: Path) -> None:
    encoder = load_encoder(tiny)
    views = [View(f"view {number}", Image.new("RGB", (112, 112), (number, 0, 0))) for number in range(5)]
    first, *others = encoder.encode_views(views)
    assert first.inputs["pixel_values"].untyped_storage().nbytes() == first.inputs["pixel_values"].nbytes
    encoder.cache_bytes = 2 * first.bytes
    assert [encoder.encode_views([view])[0] for view in views] == [first, *others], "nothing new, nothing dropped"
    encoder.encode_views([View("new", views[0].image)])
    assert encoder.encode_views(views[4:])[0] is others[-1]
    assert encoder.encode_views(views[3:4])[0] is not others[-2]
    again = encoder.encode_views(views)
    assert all(kept is known for kept, known in zip(encoder.encode_views(views), again, strict=True))
