"""Several looks in the loop: which turns become pairs, and what is trained on them."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loud import louder
from waiting import wait_until

from visrl.box import Box
from visrl.config import CONFIGS, ConfigError, build_config
from visrl.data.check import check
from visrl.data.convert import convert
from visrl.data.native import read_records
from visrl.data.sources import read_preferences
from visrl.engines.base import Completion
from visrl.evolve.batches import SetAside
from visrl.evolve.check import check_lines, measure_critic
from visrl.evolve.config import TINY_ONLINE, EvolveConfig, FilterConfig, GenerateConfig
from visrl.evolve.filter import filter_pairs
from visrl.evolve.generate import generate
from visrl.evolve.pairs import FilterSettings, make_pairs
from visrl.evolve.tokens import batch_sizes
from visrl.evolve.turns import make_turn_pairs, tree_of, turn_pairs, turn_preference
from visrl.manifest import read_manifest
from visrl.models.attention import use_tree_attention
from visrl.models.load import load_encoder, load_model
from visrl.models.tiny import CHECKPOINT
from visrl.packing.forward import branch_logps
from visrl.prompts import focus_prompt
from visrl.records import (
    Preference,
    RecordError,
    Sample,
    Trajectory,
    TrajectoryLook,
    Verdict,
    belongs_to,
    write_records,
)
from visrl.rewards.advantages import value_of
from visrl.rewards.critic import ModelCritic, SceneOracle
from visrl.rewards.grader import FunctionCritic
from visrl.rewards.outcome import OutcomeCritic, metric_grader
from visrl.train.data import Preferences
from visrl.train.items import Collator
from visrl.train.losses import dpo

ASKED = Sample("q", "scene:train/0", "Which number?", "7")
BOXES = {"A": Box(0, 0, 0.5, 0.5), "B": Box(0.5, 0, 1, 0.5), "C": Box(0.25, 0.25, 0.75, 0.75), "D": Box(0, 0.5, 0.5, 1)}
OWN = FilterSettings(losers="own")


def tried(first: int, said: str, path: tuple[int, ...] = (), *, end: str = "answered", name: str = "q", score=None):
    """The try whose looks are the letters of `said` and whose answer is its figure, right if it is 7; `first` is its
    first turn, from which `path` goes on."""
    looks = tuple(TrajectoryLook(one, BOXES[one]) for one in said if one in BOXES)
    answer = said[len(looks) :] or None
    last = looks[-1] if looks else TrajectoryLook("", None)
    error = {"no_call": "box: none", "failed": "engine: lost"}.get(end)
    path = (*path, *[0] * (len(looks) - len(path)))
    trajectory = Trajectory(
        name, first // 2, first % 2, last.text, last.box, "sampled", answer, "test", 0, error, looks=looks, end=end,
        path=path,
    )  # fmt: skip
    score = score if answer is None or score is not None else float(answer == "7")
    return trajectory, Verdict(name, first // 2, first % 2, None, score, path=path)


def told(pairs) -> list[tuple[str, str, str, float, float]]:
    """Looks before, chosen, rejected, and what the two are worth."""
    return [
        ("".join(look.text for look in pair.before), pair.chosen.text, pair.rejected.text,
         round(pair.chosen.value, 6), round(pair.rejected.value, 6))
        for pair in pairs
    ]  # fmt: skip


# --- Which turns become pairs -----------------------------------------------------------------------------------------


def test_a_turn_is_worth_the_mean_of_what_comes_after_it_fork_by_fork():
    """After A an answer of 1, and a second look that was gone on from twice, to 1 and to 0: (1 + ½) / 2 = ¾."""
    judged = [tried(0, "A7", (0,)), tried(0, "AB7", (1, 0)), tried(0, "AB1", (1, 1)), tried(1, "1")]
    root = tree_of(judged, OWN)
    assert [value_of(turn.outcome) for turn in root.turns.values()] == [0.75, 0.0]
    assert told(turn_pairs(ASKED, judged, OWN)) == [
        ("", "A", "1", 0.75, 0.0), ("A", "7", "B", 1.0, 0.5), ("AB", "7", "1", 1.0, 0.0),
    ]  # fmt: skip
    kinds = [pair.kind for pair in turn_pairs(ASKED, judged, OWN)]
    assert kinds == ["look over answer", "answer over look", "answer over answer"]


def test_turns_of_one_text_are_one_turn_that_was_sampled_several_times():
    judged = [tried(0, "A7"), tried(1, "A1"), tried(2, "B1"), tried(3, "A7")]
    (first, then) = turn_pairs(ASKED, judged, replace(OWN, min_difference=0.6))
    assert (first.chosen.text, first.chosen.sampled, first.rejected.sampled) == ("A", 3, 1)
    assert told([first, then]) == [("", "A", "B", 0.666667, 0.0), ("A", "7", "1", 1.0, 0.0)]


def test_a_price_turns_a_preference_around():
    """A is right in three of four tries, B looks once more and is always right: at no price B is better by a quarter;
    at ½ a look A is worth ½ of that and B a quarter."""
    judged = [*(tried(0, f"A{said}", (n,)) for n, said in enumerate("7771")), tried(1, "BC7")]
    free, dear = (replace(OWN, min_difference=0.1, look_price=price) for price in (0.0, 0.5))
    assert told(turn_pairs(ASKED, judged, free))[0] == ("", "B", "A", 1.0, 0.75)
    assert told(turn_pairs(ASKED, judged, dear))[0] == ("", "A", "B", 0.375, 0.25)


def test_answering_at_once_is_better_by_the_price_and_no_less_by_rounding():
    judged = [tried(0, "A7"), tried(1, "7")]
    assert turn_pairs(ASKED, judged, replace(OWN, min_difference=0.1)) == "too_alike"
    (pair,) = turn_pairs(ASKED, judged, replace(OWN, min_difference=0.1, look_price=0.1))
    assert (pair.kind, pair.chosen.text) == ("answer over look", "7")
    assert pair.chosen.value - pair.rejected.value < 0.1, "which is why rounding is allowed for"


@pytest.mark.parametrize(
    ("tries", "reason"),
    [
        ([], "not_generated"),
        ([(0, "", "no_call"), (1, "A", "failed")], "every_try_failed"),
        ([(0, "A", "tokens"), (1, "B", "no_call")], "nothing_readable"),
        ([(0, "A7", "answered"), (1, "A7", "answered"), (2, "B", "tokens")], "one_text"),
        ([(0, "A7", "answered"), (1, "B7", "answered")], "too_alike"),
    ],
)
def test_a_question_without_a_pair_says_why(tries, reason):
    assert turn_pairs(ASKED, [tried(first, said, end=end) for first, said, end in tries], OWN) == reason


def test_an_unfinished_try_has_no_score_unless_it_is_punished():
    judged = [tried(0, "A7", (0,)), tried(0, "A", (1,), end="tokens"), tried(1, "B1"), tried(2, "C", end="no_call")]
    assert told(turn_pairs(ASKED, judged, OWN)) == [("", "A", "B", 1.0, 0.0)]
    assert told(turn_pairs(ASKED, judged, replace(OWN, punish_unfinished=True))) == [("", "A", "B", 0.5, 0.0)]
    unread = [*judged[2:], (judged[0][0], replace(judged[0][1], answer_score=None))]
    assert turn_pairs(ASKED, unread, OWN) == "one_text", "what could not be read is no 0"


def test_ties_are_drawn_by_the_question_and_not_by_the_order():
    def chosen(name: str) -> tuple[str, str]:
        judged = [tried(n, said, name=name) for n, said in enumerate(["A7", "B7", "C1", "D1"])]
        (pair,) = turn_pairs(replace(ASKED, id=name), judged, OWN)
        (again,) = turn_pairs(replace(ASKED, id=name), judged[::-1], OWN)
        assert (pair.chosen.text, pair.rejected.text) == (again.chosen.text, again.rejected.text)
        return pair.chosen.text, pair.rejected.text

    drawn = [chosen(f"question {n}") for n in range(60)]
    assert min(sum(one == both for one in drawn) for both in (("A", "C"), ("A", "D"), ("B", "C"), ("B", "D"))) > 5


def test_tries_that_do_not_belong_together_are_refused():
    one_look = Trajectory("q", 0, 1, "[0]", BOXES["A"], "sampled", "7", "test", 0), Verdict("q", 0, 1, 1.0, 1.0)
    with pytest.raises(RecordError, match="a try of one look among tries of several"):
        tree_of([tried(0, "A7"), one_look], OWN)
    with pytest.raises(RecordError, match="several looks among those of one"):
        make_pairs([ASKED], *zip(one_look, tried(2, "A7"), strict=True), OWN)
    with pytest.raises(RecordError, match=r"say different things of one turn, path \[0\]"):
        tree_of([tried(0, "A7"), tried(0, "B1")], OWN)
    with pytest.raises(RecordError, match="trajectories and verdicts differ"):
        make_turn_pairs([ASKED], [tried(0, "A7")[0]], [replace(tried(0, "A7")[1], path=(1,))], OWN)


def test_a_preference_shows_the_crops_of_the_looks_before():
    judged = [tried(0, "A7", (0,)), tried(0, "AB7", (1, 0)), tried(0, "AB1", (1, 1)), tried(1, "1")]
    rows = [turn_preference(ASKED, pair) for pair in turn_pairs(ASKED, judged, OWN)]
    assert [(row.step, row.prompt.count("<image>"), row.chosen) for row in rows] == [
        ("box", 1, "A"), ("box", 2, "7"), ("answer", 3, "7"),
    ]  # fmt: skip
    assert rows[2].prompt == focus_prompt("Which number?") + "\n<image>\n<image>"
    assert [picture.crop for picture in rows[2].images] == [None, BOXES["A"], BOXES["B"]]
    assert all(belongs_to(rows[:n], row) for n, row in enumerate(rows) if n)


# --- Critics ----------------------------------------------------------------------------------------------------------


def test_critics_score_the_answer_alone_and_nothing_that_has_none():
    samples = [ASKED] * 4
    tries = [tried(0, "A7")[0], tried(1, "1")[0], tried(2, "A", end="tokens")[0], tried(3, "", end="no_call")[0]]
    for critic in (
        OutcomeCritic("exact", metric_grader("exact")),
        SceneOracle(lambda size: size),
        FunctionCritic("mine", lambda asked, done: [(None, float(one.answer == "7")) for one in done]),
    ):
        verdicts = critic.judge(samples, tries)
        assert [one.answer_score for one in verdicts] == [1.0, 0.0, None, None]
        assert not any(one.box_score for one in verdicts)
        assert [one.path for one in verdicts] == [one.path for one in tries]


class Agreeable:
    """An engine that gives everything it is asked about a full score; `asked` are the questions."""

    name = "agreeable"

    def __init__(self):
        self.asked: list[str] = []

    def complete(self, talks, sampling, seeds):
        self.asked += [talk.messages[0].text for talk in talks]
        return [[Completion('{"score": 1}', tokens=5)] for _ in talks]


def test_a_model_is_asked_once_about_each_answer_and_never_about_a_box():
    engine = Agreeable()
    tries = [tried(0, "A7")[0], tried(1, "7")[0], tried(2, "AB1")[0], tried(3, "A", end="tokens")[0]]
    critic = ModelCritic(engine)
    verdicts = critic.judge([ASKED] * 4, tries)
    assert [one.answer_score for one in verdicts] == [1.0, 1.0, 1.0, None]
    assert [text.count("Their answer: 7") + text.count("Their answer: 1") for text in engine.asked] == [1, 1]
    samples = [replace(ASKED, id=str(n), answer=str(n), box=BOXES["A"]) for n in range(4)]
    told = check_lines(measure_critic(critic, samples, about_boxes=False))
    assert told[1].startswith("answers: AUC 0.500")
    assert not any("This picture is a part" in text for text in engine.asked)
    assert told[-1] == "boxes: not checked, a look is worth what comes after it"


# --- Keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"max_looks": 2}, "diversity: the controller replaces the one box of a try; set diversity: false"),
        ({"max_looks": 2, "diversity": False, "trigger": 0.3}, "trigger is the diversity controller's"),
        ({"max_looks": 2, "diversity": False, "use_box_critic": False}, "use_box_critic: a look is worth what comes"),
        ({"max_looks": 1, "diversity": False, "num_forks": 2}, "num_forks: there are at most 1 turns"),
        ({"max_looks": 0, "diversity": False, "answers": 2}, "answers: no look is gone on from several times"),
        ({"num_forks": 2}, "num_forks: one look is always taken"),
        ({"max_looks": 13, "diversity": False}, "max_looks: .*12"),
        ({"protocol": "deepeyes"}, "protocol: pairs show crops as visrl cuts them, and deepeyes shows its own"),
        ({"protocol": "visco"}, "protocol: Input should be 'visrl', 'deepeyes'"),
        ({"look_price": 0.1}, "unknown key 'look_price'"),
    ],
)
def test_keys_of_generation_that_do_not_go_together_are_one_sentence(keys, why):
    with pytest.raises(ConfigError, match=why) as raised:
        build_config(GenerateConfig, {"dataset": "d", "model_name_or_path": "m", "output_dir": "o", **keys}, "mine")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"max_looks": 2, "diversity": False}, "losers=paper: turns of several looks lose to others"),
        ({"look_price": 0.1}, "look_price is of several looks; set max_looks"),
        ({"punish_unfinished": True}, "punish_unfinished is of several looks; set max_looks"),
        (
            {"max_looks": 2, "diversity": False, "losers": "own", "compare_paper": True, "critic": "outcome"},
            "compare_paper: the paper's critic and rule judge one look",
        ),
    ],
)
def test_keys_of_the_loop_that_do_not_go_together_are_one_sentence(keys, why):
    with pytest.raises(ConfigError, match=why):
        build_config(EvolveConfig, {"dataset": "d", "model_name_or_path": "m", "output_dir": "o", **keys}, "mine")


# --- The files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def filtered(tmp_path: Path) -> Path:
    """A folder of hand-made tries at two questions and one that was not asked, filtered."""
    rows = [tried(0, "A7", (0,)), tried(0, "AB7", (1, 0)), tried(0, "AB1", (1, 1)), tried(1, "1")]
    rows += [tried(2, "", end="no_call"), *(tried(n, "C7", name="r") for n in range(2))]
    for name, number in (("trajectories", 0), ("verdicts", 1)):
        write_records(tmp_path / "g" / f"{name}.jsonl", [one[number] for one in rows])
    asked = [{"id": name, "image": "scene:train/0", "question": "Which?", "answer": "7"} for name in "qrs"]
    write_records(tmp_path / "mine.jsonl", asked)
    return tmp_path


def test_filter_counts_pairs_by_kind_and_depth_and_questions_by_reason(filtered, capsys):
    given = {"input_dir": filtered / "g", "dataset": str(filtered / "mine.jsonl")}
    kept = {"losers": "own", "look_price": 0.1, "min_difference": 0.4}
    counts = filter_pairs(FilterConfig(**given, **kept, output_dir=filtered / "f"))
    assert (counts["questions"], counts["kept"], counts["pairs"]) == (3, 1, 3)
    assert counts["dropped_by_reason"] == {"not_generated": 1, "one_text": 1}
    assert counts["pairs_by_kind"]["answer over look"] == 1
    assert counts["pairs_by_looks_before"] == {"0": 1, "1": 1, "2": 1}
    assert counts["tries_by_end"] == {"no_call": 1, "scored": 6}
    said = capsys.readouterr().out
    assert "1 look over answer, 1 answer over look, 1 answer over answer; looks before: 1 after 0, 1 after 1" in said
    assert "no pair says that the one with a look less is better" in said
    page = (filtered / "f" / "pairs.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 + 2
    assert re.search(r"answer over look, after 1 look\b", page)
    assert "dropped: one text" in page
    with pytest.raises(ConfigError, match="losers=paper: turns of several looks lose to others of the policy's"):
        filter_pairs(FilterConfig(**given, output_dir=filtered / "paper"))
    report = check("visrl", [str(filtered / "f" / "preferences.jsonl")])
    assert (report.good, report.rows) == (3, 3)
    summary = convert("visrl", "sharegpt", [str(filtered / "f" / "preferences.jsonl")], str(filtered / "r.json"))
    assert (sum(summary.written.values()), dict(summary.bad)) == (1, {"several_looks": 1})


def test_a_price_means_nothing_to_tries_of_one_look(tmp_path):
    one_look = Trajectory("q", 0, 0, "[0]", BOXES["A"], "sampled", "7", "test", 0), Verdict("q", 0, 0, 1.0, 1.0)
    for name, record in zip(("trajectories", "verdicts"), one_look, strict=True):
        write_records(tmp_path / "g" / f"{name}.jsonl", [record])
    write_records(tmp_path / "mine.jsonl", [{"id": "q", "image": "scene:train/0", "question": "Which?", "answer": "7"}])
    given = {"input_dir": tmp_path / "g", "dataset": str(tmp_path / "mine.jsonl"), "losers": "own"}
    for key, value in (("look_price", 0.1), ("punish_unfinished", True)):
        with pytest.raises(ConfigError, match=f"{key}: these are tries of one look; leave it out"):
            filter_pairs(FilterConfig(**given, **{key: value}, output_dir=tmp_path / "f"))


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loud(tiny: Path):
    model = load_model(tiny)
    louder(model)
    use_tree_attention(model)
    return model, load_encoder(tiny)


def rows_of_several_looks(name: str = "q") -> list[Preference]:
    """Pairs of one question after none to four looks: up to five pictures in a row."""
    judged = [
        tried(0, "ABCD7", (0, 0, 0, 0), name=name), tried(0, "ABCD1", (0, 0, 0, 1), name=name),
        tried(0, "ABC1", (0, 0, 1), name=name), tried(0, "AB1", (0, 1), name=name), tried(1, "1", name=name),
    ]  # fmt: skip
    settings = replace(OWN, min_difference=0.1)
    sample = replace(ASKED, id=name)
    return [turn_preference(sample, pair) for pair in turn_pairs(sample, judged, settings)]


def test_a_stage_takes_the_rows_of_its_step_and_an_item_all_rows_of_a_question(loud, tmp_path):
    rows = [*rows_of_several_looks("q"), *rows_of_several_looks("r")]
    write_records(tmp_path / "p.jsonl", rows)
    assert read_preferences(str(tmp_path / "p.jsonl")) == rows
    found = list(read_records(Preference, tmp_path / "p.jsonl"))
    _, encoder = loud
    for stage, steps in ((1, ["box"] * 3), (2, ["box"] * 3 + ["answer"])):
        items = Preferences(encoder, found, stage=stage, mismatched=True)
        assert len(items) == 2
        item = items[0]
        assert [row.step for row in item.rows] == steps
        assert len({row.key for row in item.rows}) == len(steps), "reference log-probabilities are kept by key"
        assert [len(row.conversation.views) for row in item.rows] == [1, 3, 4, 5][: len(steps)]
        # KTO's other response is that of the same turn at the other question.
        other = [one for one in found if one.id == "r"][: len(steps)]
        assert [row.responses[2] for row in item.rows] == [("mismatched", one.chosen) for one in other]


def test_an_item_with_five_pictures_has_the_log_probabilities_of_its_rows_one_by_one(loud):
    model, encoder = loud
    item = Preferences(encoder, rows_of_several_looks(), stage=2)[0]
    collate = Collator(encoder)
    together = branch_logps(model, collate([item])["batch"].packed)
    alone = [branch_logps(model, collate([replace(item, rows=(row,))])["batch"].packed).sums for row in item.rows]
    torch.testing.assert_close(together.sums, torch.cat(alone), rtol=1e-5, atol=1e-5)
    losses = [
        dpo(sums[::2], sums[1::2], -sums[::2].detach(), sums[1::2].detach())
        for sums in (together.sums, torch.cat(alone))
    ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    weights = torch.linspace(-1, 2, len(together.sums))
    grads = []
    for sums in (together.sums, torch.cat(alone)):
        model.zero_grad()
        (sums * weights).sum().backward()
        grads.append(torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None]))
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 1e-4


# --- Generation -------------------------------------------------------------------------------------------------------


def test_a_generation_of_several_looks_that_was_cut_goes_on_to_the_same_files(tmp_path):
    values = {
        "model_name_or_path": str(CHECKPOINT), "dataset": "scenes:preference/0+4", "critic": "outcome",
        "max_looks": 2, "num_forks": 2, "answers": 2, "rounds": 1, "batch_size": 1, "diversity": False,
    }  # fmt: skip
    whole, out = generate(GenerateConfig(**values, output_dir=tmp_path / "whole")), tmp_path / "out"
    tries = list(read_records(Trajectory, whole / "trajectories.jsonl"))
    keys = [(one.sample_id, one.round, one.branch, one.path) for one in tries]
    assert len(set(keys)) == len(keys) > 8
    assert {one.end for one in tries} <= {"answered", "no_call", "tokens"}
    out.mkdir()
    for name, cut in {
        "started.json": 1.0,
        "tokens.jsonl": 0.9,
        "trajectories.jsonl": 0.7,
        "verdicts.jsonl": 0.4,
    }.items():
        data = (whole / name).read_bytes()
        (out / name).write_bytes(data[: int(cut * len(data))])
    generate(GenerateConfig(**values, output_dir=out))
    for name in ("trajectories.jsonl", "verdicts.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    costs = [read_manifest(folder)["sampled_tokens"] for folder in (whole, out)]
    assert costs[0] == costs[1]


def test_what_failed_is_tried_again_and_what_did_not_is_taken_over(tmp_path):
    """Batches of several looks differ in how many tries they have: what an earlier run left is found by its
    questions."""
    samples = [replace(ASKED, id=name) for name in "abcd"]
    left = [tried(0, "A7", name="a"), tried(1, "7", name="a"), tried(0, "", end="failed", name="b")]
    left += [tried(0, "7", name=name) for name in "cd"]
    write_records(tmp_path / "failed-t.jsonl", [one for one, _ in left])
    again = SetAside(Trajectory, tmp_path / "t.jsonl", lambda one: one.error is not None)
    found = [again.batch(samples[:1]), again.batch(samples[1:2]), again.batch(samples[2:])]
    assert [[one.sample_id for one in batch] for batch in found] == [["a", "a"], [], ["c", "d"]]
    write_records(tmp_path / "tokens.jsonl", [
        {"batch": 0, "of": "policy", "trajectories": 3}, {"batch": 0, "of": "critic"},
        {"batch": 1, "of": "policy", "trajectories": 9}, {"batch": 1, "of": "policy", "trajectories": 2},
        {"batch": 3, "of": "policy", "trajectories": 5},
    ])  # fmt: skip
    assert batch_sizes(tmp_path / "tokens.jsonl") == [3, 2], "a batch that was done again has its last size"


@pytest.mark.slow
def test_an_iteration_killed_while_it_generates_ends_as_an_uninterrupted_one(tmp_path):
    """Through the command line: two looks, trees of two forks, a price; both stages are trained on what is kept."""
    keys = {
        "iterations": 1, "dataset": "scenes:preference/0+24", "max_samples": 24, "compare_paper": "false",
        "max_looks": 2, "num_forks": 2, "answers": 2, "rounds": 2, "batch_size": 4, "look_price": 0.1,
        "min_difference": 0.1, "train": "{max_steps: 2}", "eval_dataset": "scenes:test/0+8",
        "online_steps": 1, "online_config": TINY_ONLINE, "train_online": "{num_answers: 2, save_steps: 1}",
    }  # fmt: skip
    command = [sys.executable, "-m", "visrl.cli", "evolve", str(CONFIGS / "tiny" / "evolve.yaml")]
    command += [f"{key}={value}" for key, value in keys.items()]

    def made(folder: str) -> list[bytes]:
        iteration = tmp_path / folder / "iter0"
        names = ("trajectories.jsonl", "verdicts.jsonl")
        kept = [(iteration / "generate" / name).read_bytes() for name in names]
        return [*kept, (iteration / "filter" / "preferences.jsonl").read_bytes()]

    subprocess.run([*command, f"output_dir={tmp_path / 'whole'}"], check=True)
    killed = subprocess.Popen([*command, f"output_dir={tmp_path / 'killed'}"])
    tries = tmp_path / "killed" / "iter0" / "generate" / "trajectories.jsonl"
    wait_until(lambda: tries.is_file() and tries.stat().st_size)
    killed.kill()
    killed.wait()
    assert not tries.with_name("manifest.json").exists(), "it was killed in the middle of its work"
    again = subprocess.run([*command, f"output_dir={tmp_path / 'killed'}"], check=True, capture_output=True, text=True)
    assert "going on after" in again.stdout
    assert "controls are left out" in again.stdout
    assert made("killed") == made("whole")
    counts = read_manifest(tmp_path / "whole" / "iter0" / "filter")["counts"]
    assert counts["pairs"] > counts["kept"] > 0
    assert len(counts["pairs_by_looks_before"]) > 1
    for step in ("stage1", "stage2-merged"):
        assert read_manifest(tmp_path / "killed" / "iter0" / step) is not None
    asked = read_manifest(tmp_path / "whole" / "online")["config"]
    assert (asked["max_looks"], asked["num_forks"], asked["look_price"]) == (2, 2, 0.1)
