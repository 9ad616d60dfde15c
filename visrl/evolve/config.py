"""The configs of `visrl generate`, `filter`, `evolve` and `demo`. Imports no torch: a typo is refused at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from visrl.box import CropRule
from visrl.config import CONFIGS, Config, ConfigError, OneOrMore, SourceConfig
from visrl.evolve.losers import MIN_DIFFERENCE, Losers
from visrl.evolve.pairs import FilterSettings, Rule
from visrl.rewards.open import CriticConfig
from visrl.rollout.diversity import TRIGGER
from visrl.scenes import KINDS, MAX_TAGS, Kind, count_scenes, format_source
from visrl.zoom.config import LookPriceConfig, SampledLooksConfig
from visrl.zoom.protocols import ZOOM_PROTOCOLS

TINY_RL = CONFIGS / "tiny" / "train_rl.yaml"
TINY_ONLINE = CONFIGS / "tiny" / "train_online.yaml"
TINY_LOOKS = CONFIGS / "tiny" / "train_online_looks.yaml"
ONLINE_STEPS, ONLINE_BATCH = 120, 16  # of the demo; the batch is that of TINY_ONLINE
LOOK_STEPS = 60  # of online reinforcement with several looks
MAX_ITERATIONS = 100  # of a demo: each seed has so many blocks of scenes to itself
SCENES_PER_QUESTION = (
    8  # of a block: no kind is asked about in every scene, and count about a single tag in one of three
)


def parse_shard(text: str) -> tuple[int, int]:
    """i and n of "i/n", 1 ≤ i ≤ n.

    Raises:
        ValueError: it is not of this form.
    """
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"a shard is i/n with i from 1 to n, not {text!r}")
    return int(match[1]), int(match[2])


def _valid_shard(text: str) -> str:
    parse_shard(text)
    return text


class QuestionsConfig(SourceConfig):
    """Which samples of a data set are asked, beside `dataset`."""

    skip_samples: int = Field(0, ge=0)
    """So many are passed by first."""


class SamplingConfig(CriticConfig, SampledLooksConfig, QuestionsConfig):
    """The keys of Algorithm 1's sampling, beside those of its engines."""

    rounds: int = Field(5, ge=1)
    """N of Algorithm 1; a round is two boxes. The released code uses 3."""
    answers: int = Field(1, ge=1)
    """M: answers sampled from the crop of each box. `critic: outcome` scores the box by them. With `max_looks` as many
    turns after each look down to the `num_forks`-th, be they answers or looks."""
    temperature: float = Field(1.0, ge=0)
    """The paper names none and the released code samples at 2; docs/EVOLVE.md says what was tried."""
    top_p: float = Field(1.0, gt=0, le=1)
    diversity: bool = True
    trigger: float = Field(TRIGGER, ge=0, le=1)
    """T: from this IoU on, the second box of a round is replaced. The released code replaces above 0.05."""
    crop_rule: CropRule | None = None
    """By default the checkpoint's own."""
    batch_size: int = Field(64, ge=1)
    """Questions in one batch: what a kill loses at most, and part of what makes a run repeat to the bit."""
    seed: int = 0

    @model_validator(mode="after")
    def _of_several_looks(self) -> SamplingConfig:
        if self.protocol in ZOOM_PROTOCOLS:
            raise ValueError(
                f"protocol: pairs show crops as visrl cuts them, and {self.protocol} shows its own; set max_looks, or "
                f"train on {self.protocol} online"
            )
        if self.max_looks is None:
            return self
        if self.diversity:
            raise ValueError("diversity: the controller replaces the one box of a try; set diversity: false")
        if self.trigger != TRIGGER:
            raise ValueError("trigger is the diversity controller's, which is off with max_looks; leave it out")
        if not self.use_box_critic:
            raise ValueError("use_box_critic: a look is worth what comes after it, no critic scores it; leave it out")
        self.check_forks("answers", self.answers > 1)
        return self


class GenerateConfig(SamplingConfig):
    """What `visrl generate` takes."""

    dataset: str
    shard: Annotated[str, AfterValidator(_valid_shard)] = "1/1"
    """i/n: the i-th of n parts of the batches, for several machines; `--shard i/n` is the same."""
    output_dir: Path


class RuleConfig(LookPriceConfig):
    """The keys of the filter's rule."""

    rule: Rule = "paper"
    """"released" is the released code's order: best and worst answer first, their boxes after."""
    t_max: float = Field(0.8, ge=0, le=1)
    t_min: float = Field(0.2, ge=0, le=1)
    use_box_critic: bool = True
    """False is the paper's ablation: answers alone decide. `critic.box` is the same key."""
    losers: Losers = "paper"
    """Which box is rejected: "paper", by the rule above; "own", the worst of the policy's own boxes; "random", one of
    the diversity controller's. Of the latter two the winner is the best of the policy's own."""
    min_difference: float | None = Field(None, gt=0, le=1)
    """Of losers: own and random, how much better the chosen box or answer must have scored; 0.5 by default. After
    several looks: how much more the chosen turn must be worth."""
    punish_unfinished: bool = False
    """Of several looks: a try that came to a limit counts as a wrong answer. It has no score otherwise."""

    @model_validator(mode="after")
    def _one_rule(self) -> RuleConfig:
        if self.losers == "paper":
            if self.min_difference is not None:
                raise ValueError("min_difference: losers=paper goes by t_max and t_min; set losers to own or random")
            return self
        for key in ("rule", "t_max", "t_min", "use_box_critic"):
            if getattr(self, key) != RuleConfig.model_fields[key].default:
                raise ValueError(f"{key}: losers={self.losers} compares box scores by min_difference; leave it out")
        return self

    def filter_settings(self) -> FilterSettings:
        apart = MIN_DIFFERENCE if self.min_difference is None else self.min_difference
        return FilterSettings(
            self.t_max, self.t_min, self.rule, self.use_box_critic, self.losers, apart,
            look_price=self.look_price, punish_unfinished=self.punish_unfinished,
        )  # fmt: skip


class FilterConfig(RuleConfig, QuestionsConfig):
    """What `visrl filter` takes: folders of `visrl generate` (one, or its shards in order), and the rule."""

    input_dir: OneOrMore[Path] = Field(min_length=1)
    dataset: str | None = None
    """By default what the folders were generated from."""
    pictures: int = Field(24, ge=0)
    """Kept and dropped questions, so many of each, that the page shows; 0: no page."""
    output_dir: Path


class ServerConfig(Config):
    """The keys of a server that is started for each policy, asked until it is healthy, and stopped."""

    server: Literal["vllm"] | list[str] | None = None
    """vLLM, or a command in which {model}, {name}, {port}, {image_max_pixels} and {crop_max_pixels} are put; None: the
    model is loaded in this process."""
    server_args: list[str] = Field(default_factory=list)
    server_start_s: float = Field(900.0, gt=0)


class StagesConfig(Config):
    """How the two stages of an iteration are trained, and what every checkpoint is compared with."""

    train: dict[str, Any] = Field(default_factory=dict)
    """Keys of `visrl train` for both stages; those of a stage go over them."""
    train_stage1: dict[str, Any] = Field(default_factory=dict)
    train_stage2: dict[str, Any] = Field(default_factory=dict)
    chosen_only: bool = False
    """The honest control: the same pairs and steps, fine-tuning on the chosen side alone."""
    train_online: dict[str, Any] = Field(default_factory=dict)
    """Keys of `visrl train` for online reinforcement: `stage: raft`, say."""
    controls: bool = True
    """Score the first and the last checkpoint with other crops than their own, too."""


class EvolveConfig(SamplingConfig, RuleConfig, ServerConfig, StagesConfig):
    """What `visrl evolve` takes: the keys of `generate` and `filter`, and how to train and to evaluate.

    `model_name_or_path` is the start, a warmed-up checkpoint; `policy_url` serves it in the first iteration only, so
    name a `server` where later ones are to be served too.
    """

    dataset: OneOrMore[str]
    """The questions, without boxes: one data set, or one for each iteration."""
    max_samples: int | None = Field(None, ge=1, serialization_alias="questions")
    """Of one data set, each iteration takes the next so many; None: all of them each time."""
    iterations: int = Field(1, ge=1)
    shards: int = Field(1, ge=1)
    """Parts that a generation is made in; `--shard i/n` makes one of them on this machine and stops."""
    train_config: Path = CONFIGS / "train_rl.yaml"
    """Of both stages; `train`, `train_stage1` and `train_stage2` go over it."""
    online_steps: int = Field(0, ge=0)
    """Steps of online reinforcement of the start, to be compared with the iterations; 0: none."""
    online_config: Path = CONFIGS / "train_online.yaml"
    """How it is trained; `train_online` goes over it."""
    online_dataset: str | None = None
    """Its questions; by default those of the first iteration."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    eval_dataset: str | None = None
    """Held-out questions on which every checkpoint is scored; None: no evaluation."""
    eval_samples: int | None = Field(None, ge=1)
    compare_paper: bool = False
    """Beside the pairs of another critic or of other losers, keep those of the paper's critic and rule from the same
    tries, to be compared in the report; nothing is trained on them."""
    output_dir: Path

    @model_validator(mode="after")
    def _compared(self) -> EvolveConfig:
        if self.compare_paper and self.losers == "paper" and self.critic != "outcome":
            raise ValueError("compare_paper: these are the paper's critic and rule already; leave it out")
        return self

    @model_validator(mode="after")
    def _random_boxes(self) -> EvolveConfig:
        if self.losers == "random" and not self.diversity:
            raise ValueError("losers=random takes the diversity controller's boxes, and diversity=false draws none")
        return self

    @model_validator(mode="after")
    def _several_looks(self) -> EvolveConfig:
        if self.max_looks is None:
            for key in ("look_price", "punish_unfinished"):
                if getattr(self, key):
                    raise ValueError(f"{key} is of several looks; set max_looks, or leave it out")
            return self
        if self.losers != "own":
            raise ValueError(f"losers={self.losers}: turns of several looks lose to others of the policy's; set own")
        if self.compare_paper:
            raise ValueError("compare_paper: the paper's critic and rule judge one look; leave it out with max_looks")
        return self


Method = Literal["outcome", "paper"]
# How the demo makes its pairs. "outcome" needs no critic and no true box: a box is worth what its answers are, and the
# policy's own boxes win and lose. "paper" is Algorithm 1 as it is published, with the oracle of drawn scenes as critic.
METHODS: dict[Method, dict[str, Any]] = {
    "outcome": {
        "critic": "outcome", "answers": 8, "losers": "own", "diversity": False, "compare_paper": True,
    },
    "paper": {},
}  # fmt: skip


class DemoConfig(StagesConfig):
    """What `visrl demo` takes; the defaults are the demo."""

    model_name_or_path: str = ""  # "": the embedded model
    output_dir: Path = Path("runs/demo")
    iterations: int = Field(2, ge=1, le=MAX_ITERATIONS)
    questions: int = Field(500, ge=1)  # preference questions drawn for each iteration
    test_questions: int = Field(1000, ge=1)
    tags: int = Field(MAX_TAGS, ge=1, le=MAX_TAGS)  # coloured tags in a scene, at most; from two on, two at least
    kinds: tuple[Kind, ...] = Field(KINDS, min_length=1)  # of questions
    per_scene: int = Field(2, ge=1)  # questions of a scene, about different tags first; a scene may allow fewer
    rounds: int = Field(5, ge=1)
    temperature: float = Field(1.0, gt=0)
    method: Method = "outcome"  # how pairs are made: a row of METHODS
    online_steps: int = Field(ONLINE_STEPS, ge=0)  # of online reinforcement beside the iterations; 0: none
    look_steps: int = Field(LOOK_STEPS, ge=0)  # of online reinforcement with several looks; 0: one look alone
    look_questions: int = Field(600, ge=1)  # held out, about scenes that need no look, one or two
    threads: int = Field(0, ge=0)  # CPU threads; 0: all
    seed: int = 0

    def evolution(self) -> EvolveConfig:
        """The demo as a run of the loop. Every iteration asks new questions; runs of different seeds do, too.

        Raises:
            ConfigError: scenes with so few tags hardly allow questions of these kinds.
        """
        from visrl.models.tiny import CHECKPOINT

        block, test_block = SCENES_PER_QUESTION * self.questions, SCENES_PER_QUESTION * self.test_questions
        first = self.seed * MAX_ITERATIONS * block  # of the scenes that are this seed's alone
        online = self.online_steps * ONLINE_BATCH
        return EvolveConfig(
            model_name_or_path=self.model_name_or_path or str(CHECKPOINT),
            dataset=tuple(
                self._scenes("preference", first + number * block, self.questions, block)
                for number in range(self.iterations)
            ),
            **METHODS[self.method],
            max_samples=self.questions,
            iterations=self.iterations,
            rounds=self.rounds,
            temperature=self.temperature,
            batch_size=32,  # as fast as 64 here, and a third of a gigabyte less
            train_config=TINY_RL,
            train=self.train,
            train_stage1=self.train_stage1,
            train_stage2=self.train_stage2,
            chosen_only=self.chosen_only,
            online_steps=self.online_steps,
            online_config=TINY_ONLINE,
            online_dataset=self._scenes("preference", first, online, MAX_ITERATIONS * block) if online else None,
            train_online=self.train_online,
            export_dtype="float32",
            eval_dataset=self._scenes("test", self.seed * test_block, self.test_questions, test_block),
            eval_samples=self.test_questions,
            controls=self.controls,
            output_dir=self.output_dir,
            seed=self.seed,
        )

    def _scenes(self, pool: str, start: int, questions: int, most: int) -> str:
        """The source of so many questions, or of one or two more where the last scene has them, of `most` scenes
        from `start` on at most."""
        asked: dict[str, Any] = {"per_scene": self.per_scene, "kinds": self.kinds, "max_tags": self.tags}
        count = count_scenes(pool, start, questions, most, **asked)
        if count is None:
            raise ConfigError(
                f"kinds, tags: {most:,} scenes of at most {self.tags} tags have fewer than {questions:,} questions of "
                f"kind {', '.join(self.kinds)}; name more kinds, or more tags"
            )
        return format_source(pool, start, count, **asked)
