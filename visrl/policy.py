"""A checkpoint at work, from Python: load it, ask it about an image, roll it out on questions.

The same two steps, engines and settings as those of every verb. Nothing here knows prompts, box text or files of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from visrl.box import CropRule
from visrl.config import ConfigError, as_config
from visrl.conversation import PromptError
from visrl.data.native import without_mark
from visrl.data.rows import RowFault
from visrl.engines.open import OpenedPolicy, PolicyConfig, opened_policy
from visrl.image_modes import to_rgb
from visrl.images import ImageError
from visrl.records import RecordError, Sample, Trajectory, Verdict
from visrl.rewards.open import CriticConfig, Grading, opened_critic
from visrl.rollout.diversity import TRIGGER
from visrl.rollout.greedy import greedy_looks
from visrl.rollout.rollout import BATCH, RolloutSettings, roll_out
from visrl.rollout.steps import Look
from visrl.sequences import batched

if TYPE_CHECKING:
    from PIL import Image


class LoadedPolicy:
    """A loaded checkpoint, in this process or behind servers.

    `engine` samples and has the codec of boxes, `settings` are the checkpoint's image sizes, crop rule and box format,
    `config` holds the keys it was opened by. `close()` ends connections to servers, as does the end of a block
    `with load_policy(…) as policy:`.
    """

    def __init__(self, config: PolicyConfig, opened: OpenedPolicy, crop_rule: CropRule | None, held: ExitStack) -> None:
        self.config = config
        self.opened = opened
        self.engine = opened.policy
        self.settings = opened.settings
        self.crop_rule: CropRule = crop_rule or opened.settings.crop_rule
        self._held = held

    def ask(self, image: str | Path | Image.Image, question: str) -> Look:
        """Where the model looks for the answer, what it sees there and what it answers, at temperature 0.

        Args:
            image: a path, a data URL, a synthetic scene (`scene:POOL/INDEX`), or a PIL image, which is taken as it is:
                an orientation in its EXIF data is not applied.
            question: a text without marks of images.

        Returns:
            The `Look`: `box` in fractions of the image, `box_pixels` in its pixels, `crop` as a PIL image, `answer`,
            and `error` where there is no answer (its first word says what failed).

        Raises:
            ImageError: the image cannot be opened, is none, or is one that the model does not take.
            PromptError: the question is empty, no text, or holds what only a prompt may hold.
        """
        if not isinstance(question, str):
            raise PromptError(f"a question is a text, not {type(question).__name__}")
        try:
            sample = Sample("", _reference(image), without_mark(question), "")
        except RowFault as error:
            raise PromptError(f"ask a question about the picture: {error}") from error
        (look,) = greedy_looks(self.engine, [sample], crop_rule=self.crop_rule)
        if isinstance(look, (ImageError, PromptError)):
            raise look
        return look

    def roll_out(
        self,
        samples: Sequence[Sample],
        *,
        rounds: int = 5,
        answers: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        diversity: bool = True,
        trigger: float = TRIGGER,
        seed: int = 0,
        image_root: str | Path | None = None,
    ) -> list[Trajectory]:
        """`rounds` × 2 sampled trajectories of every question: a box, and the answer given from its crop.

        Every request has a seed of its own, so a question's trajectories do not depend on the rest of the batch. A
        failed rollout is a trajectory with its `error`.

        Args:
            samples: questions with their images; true boxes and answers are not looked at.
            rounds: N of Algorithm 1 (VisRL, arXiv 2503.07523); a round is two boxes.
            answers: how many are sampled from the crop of each box.
            temperature: of boxes and answers alike; 0 is greedy.
            top_p: nucleus sampling: the probability mass that is sampled from.
            diversity: whether the second box of a round is replaced by a random one where it agrees with the first.
            trigger: T, the IoU from which on two boxes agree.
            seed: the run's; the same gives the same trajectories.
            image_root: the folder that relative paths of images start from.

        Returns:
            `len(samples)` × `rounds` × 2 trajectories, in order of sample, round and branch.

        Raises:
            ConfigError: `rounds`, `answers`, `temperature`, `top_p` or `trigger` is outside its range.
        """
        settings = RolloutSettings(rounds, temperature, top_p, trigger, diversity, self.crop_rule, seed, answers)
        return [one for part in batched(samples, BATCH) for one in roll_out(self.engine, part, settings, image_root)]

    def close(self) -> None:
        """End the connections to servers; a model in this process has none."""
        self._held.close()

    def __enter__(self) -> LoadedPolicy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def load_policy(model: str | Path | PolicyConfig, *, crop_rule: CropRule | None = None, **keys: Any) -> LoadedPolicy:
    """The policy of a checkpoint, loaded into this process, or reached at the servers of `policy_url`.

    Args:
        model: a checkpoint's folder, its name on a hub, or a `PolicyConfig`.
        crop_rule: how crops are cut; by default as the checkpoint was made for.
        keys: keys of `PolicyConfig`, as of every verb that asks a policy: `adapter_name_or_path`, `image_max_pixels`,
            `policy_url`, `policy_served_name`, `box_codec` …

    Raises:
        ConfigError: an unknown key (with the nearest known one), an unknown crop rule, or keys that do not go together.
        CheckpointError: a model that cannot be loaded.
        EndpointError: a server that does not answer, or serves another model.
    """
    if isinstance(model, PolicyConfig):
        config = as_config(PolicyConfig, model, keys)
    else:
        config = as_config(PolicyConfig, None, {"model_name_or_path": str(model), **keys})
    if crop_rule is not None and crop_rule not in get_args(CropRule):
        raise ConfigError(f"crop_rule must be one of {', '.join(get_args(CropRule))}, not {crop_rule!r}")
    with ExitStack() as held:
        opened = held.enter_context(opened_policy(config))
        return LoadedPolicy(config, opened, crop_rule, held.pop_all())


def ask(model: str | Path | PolicyConfig, image: str | Path | Image.Image, question: str, **keys: Any) -> Look:
    """`load_policy(model, **keys).ask(image, question)`, for one question; for several, keep the policy loaded.

    Raises:
        ConfigError, CheckpointError, EndpointError, ImageError, PromptError: as of these two.
    """
    with load_policy(model, **keys) as policy:
        return policy.ask(image, question)


def score(
    samples: Sequence[Sample],
    trajectories: Sequence[Trajectory],
    policy: LoadedPolicy,
    *,
    image_root: str | None = None,
    seed: int = 0,
    **keys: Any,
) -> list[Verdict]:
    """The scores that a critic gives trajectories: one for the box, one for the answer.

    Args:
        samples: the questions of the trajectories, with their reference answers, in any order.
        trajectories: of `policy`, as `roll_out` gives them.
        policy: the critic sees crops by its crop rule, and is its original base model unless `keys` name another one.
            Synthetic scenes are scored exactly.
        image_root: the folder that relative paths of images start from.
        seed: of the sampling with which an unreadable reply is asked again.
        keys: keys of `CriticConfig`: `critic`, `critic_model_name_or_path`, `critic_url`, `critic_served_name` …

    Returns:
        A verdict for every trajectory, in their order, its scores in [0, 1]; None where none could be read, or where
        the rollout had failed.

    Raises:
        RecordError: a trajectory of a question that is not among the samples.
        ConfigError: an unknown key, or no critic for these samples.
        CheckpointError, EndpointError: a critic that cannot be loaded, or a server that does not serve it.
    """
    config = as_config(CriticConfig, None, {**policy.config.model_dump(exclude_unset=True), **keys})
    asked = {sample.place: sample for sample in samples}
    for one in trajectories:
        if one.place not in asked:
            raise RecordError(f"a trajectory is about question {one.sample_id!r}, which is not among the samples")
    grading = Grading.of(policy.opened, samples, policy.crop_rule, image_root, seed)
    with opened_critic(config, grading) as critic:
        return critic.judge([asked[one.place] for one in trajectories], trajectories)


def _reference(image: str | Path | Image.Image) -> str:
    """An image by reference, as records have it; one in memory is its own PNG, pixel by pixel."""
    if isinstance(image, str | Path):
        return str(image)
    from PIL import Image

    from visrl.engines.endpoint import data_url

    if not isinstance(image, Image.Image):
        kinds = "a path, a data URL, a synthetic scene (scene:POOL/INDEX) or a PIL image"
        raise ImageError(f"an image is {kinds}, not {type(image).__name__}")
    try:
        image.load()  # one that was opened and not read yet does not know all of its mode
    except OSError as error:
        raise ImageError(f"the image cannot be read: {error}") from error
    return data_url(to_rgb(image, "the image"))
