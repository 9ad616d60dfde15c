"""The local engine against transformers' own generate, on real pictures of drawn scenes and a random tiny model."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

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
from visrl.engines.base import Request, Sampling
from visrl.engines.local import LocalEngine
from visrl.images import open_image
from visrl.models.attention import attending_trees
from visrl.models.load import CheckpointError, load_model
from visrl.models.modes import evaluating
from visrl.packing.forward import token_logps
from visrl.packing.pack import pack
from visrl.packing.tree import prefix_trees
from visrl.records import Picture
from visrl.scenes import scene_samples

BOXES = [Box(0.05 * n, 0.1, 0.05 * n + 0.3, 0.5) for n in range(6)]


@pytest.fixture(scope="module")
def engine(tiny):
    engine = LocalEngine.load(tiny)
    # A freshly initialised model says one thing for ever; louder weights make its texts differ.
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in engine.model.parameters():
            if weights.ndim > 1:
                weights.add_(torch.randn_like(weights) * 0.1)
    return engine


@pytest.fixture(scope="module")
def talks():
    samples = scene_samples("validation", 0, 6)
    wholes = [image_view(Picture(s.image), open_image(s.image)) for s in samples]
    first = [focus_conversation(s.question, w) for s, w in zip(samples, wholes, strict=True)]
    second = [
        answer_conversation(s.question, w, crop_view(w, Picture(s.image, b)))
        for s, w, b in zip(samples, wholes, BOXES, strict=True)
    ]
    return first, second


def plain_generate(engine: LocalEngine, talk: Conversation, tokens: int) -> str:
    """The text of transformers' generate for one conversation by itself."""
    path = engine.encoder.encode(talk, [None])[0]
    ids = torch.tensor(path.ids)[None]
    model = engine.model
    model.model.language_model.config._attn_implementation = "sdpa"
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == engine.encoder.image_token_id).int(),
        pixel_values=torch.cat([view.inputs["pixel_values"] for view in path.views]),
        image_grid_thw=torch.cat([view.inputs["image_grid_thw"] for view in path.views]),
        do_sample=False,
        max_new_tokens=tokens,
        suppress_tokens=engine.encoder.image_ids,
    )
    model.model.language_model.config._attn_implementation = "visrl_tree"
    return engine.encoder.decode(out[0, ids.shape[1] :].tolist())


def test_greedy_texts_of_both_steps_equal_plain_generate(engine, talks):
    for step in talks:
        ours = engine.complete(step, Sampling(max_tokens=12), [[0]] * len(step))
        theirs = [plain_generate(engine, talk, 12) for talk in step]
        assert [texts[0].text for texts in ours] == theirs
        assert len(set(theirs)) > 1


def test_a_sample_does_not_depend_on_what_else_is_drawn(engine, talks):
    sampling = Sampling(1.0, 0.9, 10)
    together = engine.complete(talks[0], sampling, [[n, n + 1, n + 2] for n in range(6)])
    for n in (0, 3, 5):
        engine.forget()
        assert engine.complete([talks[0][n]], sampling, [[n + 1]])[0][0] == together[n][1]
    assert len({texts[0].text for texts in together}) > 1


def test_the_second_step_computes_only_what_is_new(engine, talks):
    first, second = talks
    engine.forget()
    engine.complete(first, Sampling(max_tokens=2), [[0]] * 6)
    before = engine.prefilled_tokens
    kept = engine.complete(second, Sampling(max_tokens=8), [[0]] * 6)
    with_kept = engine.prefilled_tokens - before
    engine.forget()
    before = engine.prefilled_tokens
    assert engine.complete(second, Sampling(max_tokens=8), [[0]] * 6) == kept
    assert with_kept < 0.75 * (engine.prefilled_tokens - before)


def test_every_row_has_its_own_limits_and_can_be_stopped(engine, talks):
    rows = [Request(talks[0][0], Sampling(max_tokens=3), 0), Request(talks[0][0], Sampling(max_tokens=7), 0)]
    seen: list[tuple[int, str]] = []

    def watch(row: int, read: Callable[[], str]) -> bool:
        seen.append((row, read()))
        return not (row == 1 and len([r for r, _ in seen if r == 1]) == 5)

    short, long = engine.generate(rows, watch)
    assert (short.tokens, short.finish_reason) == (3, "length")
    assert long.tokens == 5
    assert long.text.startswith(short.text)
    assert seen[-1] == (1, long.text)


def test_control_tokens_in_a_question_are_an_error_and_not_a_crash(engine, talks):
    bad = Conversation((Message("user", "What is <|image_pad|> here?"),))
    good = talks[0][0]
    (failed,), (fine,) = engine.complete([bad, good], Sampling(max_tokens=2), [[0], [0]])
    assert failed.text is None
    assert "control token" in failed.error
    assert fine.text is not None


def test_no_model_is_one_clear_sentence(tmp_path, tiny):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        LocalEngine.load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="the weights cannot be loaded"):
        load_model(tmp_path)


def test_rows_that_end_early_change_nothing_for_the_others(engine, talks):
    """Most trees and forks end after a token or two and are left out of the steps that follow."""
    lengths = [[1, 9, 2], [1, 1, 1], [12, 1, 4], [2, 1, 1], [1, 2, 1], [1, 1, 3]]
    rows = [
        Request(talk, Sampling(temperature, 0.9, length), seed)
        for talk, own in zip(talks[0], lengths, strict=True)
        for seed, length in enumerate(own)
        for temperature in (0.0, 1.0)
    ]
    engine.forget()
    together = engine.generate(rows)
    follow_up = engine.complete(talks[1], Sampling(max_tokens=8), [[0]] * 6)
    for row, completion in zip(rows, together, strict=True):
        engine.forget()
        assert engine.generate([row])[0] == completion
    engine.forget()
    assert engine.complete(talks[1], Sampling(max_tokens=8), [[0]] * 6) == follow_up


@pytest.mark.parametrize("limit", [3, 6])
def test_rows_that_join_later_change_nothing_for_anyone(engine, talks, limit):
    """Rows of both steps, several of one picture, join and leave at any token; each says what it says alone."""
    rows = [
        Request(talk, Sampling(float(n % 2), 0.9, 1 + 11 * (n + sample) % 43), 10 * n + sample)
        for n, talk in enumerate([*talks[0], *talks[1]])
        for sample in range(2 + n % 3)
    ]
    order = np.random.default_rng(limit).permutation(len(rows)).tolist()
    engine.forget()
    running, done, slots = engine.begin(), {}, []
    while order or len(running):
        if len(running) < limit:
            done |= running.add({n: rows[n] for n in order[:3]})
            del order[:3]
        done |= running.step()
        slots.append(running._slots.visible.shape[2] if len(running) else 0)
    assert len(done) == len(rows)
    for n, row in enumerate(rows):
        engine.forget()
        assert engine.generate([row])[0] == done[n]
    longest = max(completion.prompt_tokens + completion.tokens for completion in done.values())
    assert max(slots) < 3 * longest  # what has ended leaves nothing behind for ever


@pytest.mark.parametrize("size", [(672, 672), (300, 90), (41, 333), (57, 20), (112, 112)])
@pytest.mark.parametrize("is_crop", [False, True])
def test_pictures_are_resized_as_the_processor_resizes_them(engine, size, is_crop):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    encoder = engine.encoder
    ours = encoder.encode_views([View(f"noise {size} {is_crop}", Image.fromarray(noise), is_crop)])[0]
    limits = encoder.limits(is_crop)
    theirs = encoder.processor.image_processor([Image.fromarray(noise)], size=limits, return_tensors="pt")
    assert torch.equal(ours.inputs["pixel_values"], theirs["pixel_values"])
    assert torch.equal(ours.inputs["image_grid_thw"], theirs["image_grid_thw"])


@pytest.mark.parametrize("sampling", [Sampling(0.7, 1.0, 12, logprobs=True), Sampling(0.0, 1.0, 12, logprobs=True)])
def test_sampled_ids_and_log_probabilities_are_those_of_a_forward_pass(engine, talks, sampling):
    """Of both steps, four samples each: ids make the text, and one packed pass over the same ids, nothing tokenized
    again, finds the log-probabilities that the engine sampled them with."""
    for step in talks:
        completions = engine.complete(step, sampling, [[1, 2, 3, 4]] * len(step))
        mark = engine.encoder.image_token_id  # which random weights may sample, and no image is for
        completions = [[one for one in own if mark not in one.ids] for own in completions]
        prompts = [engine.encoder.encode(talk, [None])[0] for talk in step]
        paths = [
            [engine.encoder.continued(prompt, one.ids) for one in own]
            for prompt, own in zip(prompts, completions, strict=True)
        ]
        flat = [one for own in completions for one in own]
        assert len(flat) > len(step) / 2
        for one in flat:
            ended = one.finish_reason == "stop"
            assert engine.encoder.decode(one.ids) == one.text
            assert (one.ids[-1] == engine.encoder.end_id) == ended
            assert len(one.ids) == len(one.logps) == one.tokens + ended
        packed = pack(prefix_trees([own for own in paths if own], mark), engine.encoder.family, mark)
        with attending_trees(engine.model), evaluating(engine.model), torch.no_grad():
            found = token_logps(engine.model, packed, sampling.temperature or 1.0)
        said = torch.tensor([logp for one in flat for logp in one.logps])
        torch.testing.assert_close(found, said, rtol=1e-4, atol=1e-5)


def test_ids_are_always_told_and_log_probabilities_where_they_are_asked_for(engine, talks):
    ((one,), *_) = engine.complete(talks[0], Sampling(max_tokens=3), [[0]] * len(talks[0]))
    assert one.ids
    assert one.logps == ()
