"""Several looks asked of real engines: over HTTP of a server that says what a transcript says, and of a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from http_server import serving
from test_engine_local import engine, plain_generate  # noqa: F401 (a fixture)
from test_zoom import SIZE, TRANSCRIPTS, whole
from tiny_families import make, plain

from visrl.box import Box
from visrl.codecs import CODECS
from visrl.config import ConfigError
from visrl.conversation import Conversation, View, crop_view, image_view
from visrl.engines.base import Sampling
from visrl.engines.endpoint import EndpointEngine
from visrl.engines.local import LocalEngine
from visrl.engines.openai_server import Endpoint
from visrl.evaluate.benchmarks import find_benchmark
from visrl.evaluate.choices import ChoiceQuestion
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.leaderboard import read_entry
from visrl.evaluate.questions import BenchmarkQuestion
from visrl.evaluate.readings import OUR_READING
from visrl.evaluate.run import evaluate
from visrl.evaluate.toolkit_export import vlmevalkit_rows
from visrl.images import open_image
from visrl.models.settings import ModelSettings
from visrl.prompts import IMAGE, focus_prompt
from visrl.records import Message, Picture, Sample, read_jsonl
from visrl.rewards.results import Result
from visrl.rollout.episodes import zoomed_looks
from visrl.rollout.protocols import VISRL, instructed, public_zoom, several_looks
from visrl.rollout.rollout import OpenedQuestion
from visrl.scenes import scene_samples


def opened(question: str, protocol) -> OpenedQuestion:
    return OpenedQuestion(Sample("1", "picture", question, "7"), whole(), SIZE, protocol.focus(question, whole()))


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_server_is_asked_turn_by_turn_and_the_last_look_is_the_answers(name):
    said = TRANSCRIPTS[name]["replies"]

    def script(handler, body):
        handler.text(said[len(handler.server.bodies) - 1])

    with serving(script) as server:
        policy = EndpointEngine(Endpoint((server.url,), "m", attempts=1), CODECS["qwen2_5_vl"])
        protocol = public_zoom(name, instructed(None))
        question = opened(TRANSCRIPTS[name]["question"], protocol)
        ((look,),) = zoomed_looks(policy, [question], protocol.zoom, "exact", Sampling(max_tokens=50), [[0]])
        policy.close()
    assert look.answer.strip(" .")[-1] == "7"
    assert look.end == "answered"
    assert len(server.bodies) == len(said)
    pictures = [json.dumps(body["messages"]).count("image_url") // 2 for body in server.bodies]
    assert pictures == sorted(pictures)
    goes_on = [body.get("continue_final_message", False) for body in server.bodies]
    assert goes_on == [name == "treevgr"] * len(said)
    assert (look.detail is not None) == bool(TRANSCRIPTS[name]["crops"])


def test_a_conversation_that_ends_with_the_models_turn_is_gone_on_with_only_where_that_is_opened():
    with serving(lambda handler, body: handler.text("7")) as server:
        policy = EndpointEngine(Endpoint((server.url,), "m", attempts=1), CODECS["qwen2_5_vl"])
        talk = Conversation((Message("user", "So?"), Message("assistant", "I see")))
        opened_turn = Conversation((Message("user", "So?"),), prefill="I see")
        policy.complete([talk, opened_turn], Sampling(max_tokens=4), [[0], [0]])
        policy.close()
    told = sorted(body.get("continue_final_message", False) for body in server.bodies)
    assert told == [False, True]
    assert [body["messages"][-1] for body in server.bodies] == [{"role": "assistant", "content": "I see"}] * 2


def test_a_tiny_model_that_says_anything_ends_under_every_protocol(engine):  # noqa: F811
    samples = scene_samples("validation", 0, 2)
    views = [image_view(Picture(one.image), open_image(one.image)) for one in samples]
    protocols = [several_looks(VISRL, 3), *(public_zoom(name, instructed(None)) for name in ("mini_o3", "vigorl"))]
    for protocol in protocols:
        questions = [
            OpenedQuestion(one, view, engine.processed_size(view.size), protocol.focus(one.question, view))
            for one, view in zip(samples, views, strict=True)
        ]
        groups = zoomed_looks(engine, questions, protocol.zoom, "exact", Sampling(1.0, 1.0, 6), [[1, 2], [3, 4]])
        assert [len(own) for own in groups] == [2, 2]
        assert {look.end for own in groups for look in own} <= {"answered", "no_call", "tokens", "failed"}
        again = zoomed_looks(engine, questions[1:], protocol.zoom, "exact", Sampling(1.0, 1.0, 6), [[4]])
        assert again[0][0].answer == groups[1][1].answer


def test_texts_after_six_looks_are_those_of_generate(engine):  # noqa: F811
    """As turns of a dialog, and as crops under one question."""
    sample = scene_samples("validation", 0, 1)[0]
    view = image_view(Picture(sample.image), open_image(sample.image))
    crops = [crop_view(view, Picture(sample.image, Box(0.1 * n, 0.2, 0.1 * n + 0.3, 0.6))) for n in range(6)]
    under = Conversation((Message("user", f"{IMAGE}\n{sample.question}" + f"\n{IMAGE}" * 6),), (view, *crops))
    turns = [Message("system", "Look."), Message("user", f"{IMAGE}{sample.question}")]
    for n in range(6):
        turns += [Message("assistant", f"<tool_call>{n}</tool_call>"), Message("user", f"See: {IMAGE}")]
    dialog = Conversation(tuple(turns), (view, *crops))
    opened_turn = replace(dialog, prefill="I see")
    torch.manual_seed(0)
    asked = [under, dialog, opened_turn]
    ours = [texts[0].text for texts in engine.complete(asked, Sampling(max_tokens=8), [[0]] * 3)]
    assert ours == [plain_generate(engine, talk, 8) for talk in asked]
    assert len(set(ours)) == 3


def test_questions_that_go_on_keep_what_was_computed_when_others_have_ended(engine):  # noqa: F811
    """In another order, and some of them: texts are those of each by itself, and nothing but the crops is computed."""
    views = [View(str(n), whole().image.crop((90 * n, 0, 90 * n + 112, 112))) for n in range(4)]
    crops = [View(f"{n}#crop", view.image.crop((0, 0, 56, 56)), is_crop=True) for n, view in enumerate(views)]
    first = [Conversation((Message("user", f"{IMAGE}\nWhich number?"),), (view,)) for view in views]
    later = [Conversation((Message("user", f"{IMAGE}\nWhich number?\n{IMAGE}"),), (views[n], crops[n])) for n in (3, 1)]
    engine.forget()
    engine.complete(first, Sampling(max_tokens=4), [[0]] * 4)
    before = engine.prefilled_tokens
    together = engine.complete(later, Sampling(max_tokens=8), [[0]] * 2)
    fresh = engine.prefilled_tokens - before
    engine.forget()
    assert [one.text for (one,) in together] == [plain_generate(engine, talk, 8) for talk in later]
    engine.complete(later, Sampling(max_tokens=8), [[0]] * 2)
    assert fresh < 0.75 * (engine.prefilled_tokens - before - fresh)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "lfm2_vl"])
def test_a_turn_that_is_opened_is_gone_on_with_in_every_form(family):
    """Shared prefixes or states, and the plain form; a template that opens the thought itself opens it once."""
    model, encoder = make(family)
    view = View("picture", whole().image.resize((112, 112)))
    talk = Conversation((Message("user", f"{IMAGE}Which number?"),), (view,), prefill="<think>")
    said = []
    for form in (encoder, plain(model, encoder)):
        texts = LocalEngine(model, form).complete(
            [talk, replace(talk, prefill="I see")], Sampling(max_tokens=6), [[0]] * 2
        )
        said.append([one.text for (one,) in texts])
    assert said[0] == said[1]
    assert said[0][0] != said[0][1]
    closed = encoder.render(talk)
    encoder.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    assert encoder.render(talk) == closed + "\n"


def test_eight_rollouts_of_four_looks_prefill_what_is_new_and_nothing_twice(tiny):
    """What a turn adds is computed once: image and question once for all, every crop once for its rollout. The image
    has 144 tokens, a crop 9, as an image of a usual size and its crops have in proportion."""
    local = LocalEngine.load(tiny, settings=ModelSettings(image_max_pixels=336 * 336, crop_max_pixels=84 * 84))
    sample = scene_samples("validation", 0, 1)[0]
    view = image_view(Picture(sample.image), open_image(sample.image))
    at = [[Box(0.05 * k, 0.1 * n, 0.05 * k + 0.3, 0.1 * n + 0.3) for n in range(4)] for k in range(8)]
    talks = [
        [
            Conversation(
                (Message("user", focus_prompt(sample.question) + f"\n{IMAGE}" * looks),),
                (view, *(crop_view(view, Picture(sample.image, box)) for box in at[k][:looks])),
            )
            for k in range(8)
        ]
        for looks in range(5)
    ]

    def prefilled(apart: bool) -> int:
        local.forget()
        before = local.prefilled_tokens
        for turn in talks:
            for part in [[talk] for talk in turn] if apart else [turn]:
                if apart:
                    local.forget()
                local.complete(part, Sampling(max_tokens=2), [[0]] * len(part))
        return local.prefilled_tokens - before

    assert prefilled(apart=True) > 5 * prefilled(apart=False)


@pytest.mark.parametrize(
    "keys", [{"max_looks": 3}, {"protocol": "mini_o3", "protocol_faults": ["labels_count_turns"], "max_new_tokens": 40}]
)
def test_an_evaluation_with_several_looks_lists_them_and_how_they_ended(tmp_path: Path, keys, capsys):
    common = {"model_name_or_path": "visrl/models/tiny/checkpoint", "dataset": "scenes:test/0+3*2"}
    rows = list(read_jsonl(evaluate(**common, **keys, output_dir=tmp_path / "a") / "results.jsonl"))
    once = list(read_jsonl(evaluate(**common, output_dir=tmp_path / "b") / "results.jsonl"))
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())
    assert sum(scores["looks"]["ends"].values()) == len(rows) == len(once)
    assert "looks a question: " in capsys.readouterr().out
    asked = "up to 3 looks" if "max_looks" in keys else "mini_o3 with labels_count_turns"
    assert read_entry("tiny", tmp_path / "a").name == f"tiny, {asked}"
    if "max_looks" in keys:  # the embedded model looks once and answers
        assert [(row["prediction"], row["box"], row["iou"]) for row in rows] == [
            (row["prediction"], row["box"], row["iou"]) for row in once
        ]
        assert scores["looks"] == {"mean": 1.0, "ends": {"answered": len(rows)}}
    else:
        assert scores["looks"]["mean"] == 0


def test_an_answer_in_tags_is_read_in_every_reading_and_a_limit_answers_nothing():
    sample = Sample("1", "picture", "Which number?", "7")
    assert OUR_READING.score(BenchmarkQuestion(sample), "<think>8</think> <answer>7</answer>") == {"correct": 1}
    benchmark, codec = find_benchmark("mme-realworld-lite"), CODECS["qwen2_5_vl"]
    choice = ChoiceQuestion("Which number?", ("7", "8"), 0)
    question = BenchmarkQuestion(replace(sample, answer="A"), choice=choice)
    done = Result(question.sample, "A", reply="<answer>A</answer>", looks=(), end="answered")
    cut_short = replace(done, prediction="", reply="A <tool_call>", end="tokens")  # the published rule would read an A
    reading = benchmark.reading("published")
    rows = [benchmark.row_of(question, one, codec, reading) for one in (done, cut_short)]
    assert [row["correct_published"] for row in rows] == [1, 0]
    assert [row["prediction"] for row in vlmevalkit_rows(rows)] == ["<answer>A</answer>", ""]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_looks": 2, "mode": "truth"}, "mode=truth puts one box in the model's place"),
        ({"protocol": "deepeyes", "max_looks": 2}, "deepeyes has its own limits"),
        ({"protocol": "deepeyes", "crop_rule": "margin"}, "deepeyes says itself what is cropped"),
        ({"protocol_faults": ["unmapped_coordinates"]}, "protocol_faults needs one of the protocols deepeyes"),
        ({"protocol": "vigorl", "protocol_faults": ["unmapped_coordinates"]}, "vigorl has no fault"),
    ],
)
def test_keys_of_several_looks_that_do_not_fit_are_refused(tmp_path: Path, keys, said):
    with pytest.raises(ConfigError, match=said):
        evaluate(
            model_name_or_path="visrl/models/tiny/checkpoint", dataset="scenes:test/0+3*2", output_dir=tmp_path, **keys
        )


def test_every_public_protocol_is_a_value_of_the_key():
    for name in TRANSCRIPTS:
        config = EvalConfig(model_name_or_path="m", dataset="scenes:test/0+3*2", output_dir="x", protocol=name)
        assert config.protocol == name
