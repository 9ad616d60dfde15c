"""Rollouts from servers: they hold the base model, are given each step's adapter by run-time LoRA, and sample.

Token ids and log-probabilities are the servers' own. Before the first step every server is held against the policy:
whether it is the same model, is shown the same prompts, and tells its tokens. What samples here is told in
engines/endpoint.py, how an adapter is loaded in engines/runtime_lora.py. Knows no reward and no loss.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from visrl.box import Size
from visrl.codecs import Codec
from visrl.conversation import Conversation, View
from visrl.engines.base import Completion, Sampling
from visrl.engines.open import behind
from visrl.engines.openai_server import EndpointError
from visrl.models.encode import Encoder, TokenPath
from visrl.models.modes import evaluating
from visrl.packing.forward import token_logps
from visrl.prompts import IMAGE
from visrl.records import Message
from visrl.rollout.protocols import VISRL
from visrl.train.checkpoints import TrainingError
from visrl.train.config import TrainConfig
from visrl.train.items import Collator
from visrl.zoom.protocols import ZOOM_PROTOCOLS

FOLDER = "rollout-adapters"
TRIALS, TRIAL_TOKENS, TRIAL_SIDE = 4, 24, 112
# Nats a token between what a server says and what the policy computes: bf16 against fp32 is a tenth of it, other
# weights are several times as much.
FAR = 0.3


class RolloutServers:
    """The policy behind servers, a `Policy`: `sync` gives them its adapter, `complete` has them sample under it.

    All processes ask for their own share; the first one alone writes adapters and has them loaded.
    """

    def __init__(self, config: TrainConfig, encoder: Encoder) -> None:
        self._config, self._encoder = config, encoder
        self._engine = behind(
            config.rollout_url,
            config.rollout_served_name or config.model_name_or_path,
            encoder,
            api_key_env=config.api_key_env,
            **config.patience,
        )
        self.name = self._engine.name
        self._folder = (config.output_dir / FOLDER).resolve()
        # Names of no other run at the same servers, and of this one where it was killed and starts again.
        self._prefix = f"visrl-{hashlib.blake2b(str(self._folder).encode(), digest_size=4).hexdigest()}-"

    # --- A policy

    @property
    def codec(self) -> Codec:
        return self._encoder.codec

    def processed_size(self, size: Size, is_crop: bool = False) -> Size:
        return self._encoder.processed_size(size, is_crop)

    def forget(self) -> None:
        """Nothing: an adapter has a name of its own in every step, and a server's prefix cache knows it by that."""

    def complete(
        self, conversations: Sequence[Conversation], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """One completion per seed; a prompt that the model cannot be shown is a completion with `error`.

        Raises:
            TrainingError: a server failed, or told no tokens: no step is taken on what is left.
        """
        found = self._engine.complete(conversations, sampling, seeds)
        flat = [one for own in found for one in own]
        if failed := [one for one in flat if one.text is None and not one.refused]:
            raise TrainingError(
                f"{len(failed):,} of {len(flat):,} requests to the rollout servers failed, so no step is taken: "
                f"{failed[0].error}; once they are up, the same command goes on from the last checkpoint"
            )
        if sampling.logprobs and (fault := next(filter(None, map(_untold, flat)), None)):
            raise TrainingError(f"{', '.join(self._engine.client.endpoint.base_urls)}: {fault}")
        return found

    # --- Before the first step

    def check(self, model: torch.nn.Module, temperature: float) -> None:
        """Hold every server against `model`, a policy before its first step; called by all processes alike.

        Raises:
            EndpointError: the first server that cannot be trained from, and why.
        """
        _as_one(self._engine.check)  # each process learns how the servers want images
        _as_one(lambda: self._check(model, temperature), first_only=True)

    def _check(self, model: torch.nn.Module, temperature: float) -> None:
        client = self._engine.client
        client.unload_adapter(f"{self._prefix}0")  # whether there are such end points
        self._unload_all()
        view = View("trial", Image.linear_gradient("L").resize((TRIAL_SIDE, TRIAL_SIDE)).convert("RGB"))
        talk = VISRL.focus("What is there?", view)
        prompt = self._encoder.encode(talk, [None])[0]
        sampling = Sampling(temperature, 1.0, TRIAL_TOKENS, logprobs=True, prompt_ids=True)
        for server in client.servers:
            asks = self._engine.asks([(talk, range(TRIALS))], sampling)
            said = [client.ask_at(server, ask) for ask in asks]
            if fault := self._fault(model, said, prompt, temperature):
                raise EndpointError(f"{server.shown}: {fault}")
        self._check_pictures()

    def _check_pictures(self) -> None:
        """Make sure that every server takes as many images in a prompt as the longest episode shows."""
        count = most_pictures(self._config)
        if count < 2:
            return
        image = Image.linear_gradient("L").resize((TRIAL_SIDE, TRIAL_SIDE)).convert("RGB")
        views = tuple(View(f"trial {n}", image, is_crop=n > 0) for n in range(count))
        talk = Conversation((Message("user", f"{IMAGE}\n" * count + "What is there?"),), views)
        client = self._engine.client
        for server in client.servers:
            (said,) = [client.ask_at(server, ask) for ask in self._engine.asks([(talk, [0])], Sampling(max_tokens=1))]
            if said.text is None:
                raise EndpointError(
                    f"{server.shown}: a prompt of {count} images failed: {said.error}; start vLLM with "
                    f"--limit-mm-per-prompt '{{\"image\": {count}}}' (`visrl api` with max_images={count}) and room "
                    "for them, or look less often"
                )

    def _fault(
        self, model: torch.nn.Module, said: Sequence[Completion], prompt: TokenPath, temperature: float
    ) -> str | None:
        """Why a server that answered this to the trial cannot be trained from; None where it can."""
        for one in said:
            if one.text is None:
                return f"a first small question failed: {one.error}"
            if untold := _untold(one):
                return untold
            shown = len(one.prompt_ids) or one.prompt_tokens
            if shown not in (0, len(prompt.ids)) or (one.prompt_ids and list(one.prompt_ids) != prompt.ids.tolist()):
                return (
                    f"it shows the model another prompt, {shown} tokens where it is {len(prompt.ids)} here; serve the "
                    "same checkpoint, with its chat template and picture sizes"
                )
        apart = self._apart(model, said, prompt, temperature)
        if apart > FAR and temperature != 1 and self._apart(model, said, prompt, 1.0) <= FAR:
            return (
                f"its log-probabilities are not of temperature={temperature:g}; start vLLM with --logprobs-mode "
                "processed_logprobs"
            )
        if apart > FAR:
            return (
                f"it does not hold the model that is trained: its log-probabilities are {apart:.2f} nats a token from "
                f"those of {self._config.model_name_or_path}; serve that model, and merge an adapter that is trained "
                "on into it before (`visrl export`)"
            )
        return None

    def _apart(self, model: torch.nn.Module, said: Sequence[Completion], prompt: TokenPath, heat: float) -> float:
        """How far the servers' log-probabilities are from the policy's at a temperature, in nats a token."""
        kept = [one for one in said if self._encoder.image_token_id not in one.ids]
        paths = [self._encoder.continued(prompt, one.ids) for one in kept]
        if not paths:
            return 0.0
        packed, _ = Collator(self._encoder, bin_length=self._config.bin_length).pack([paths])
        with torch.no_grad(), evaluating(model):
            ours = token_logps(model, packed.to(next(model.parameters()).device), heat)
        order = packed.branch.unique_consecutive().tolist()
        theirs = torch.tensor([logp for branch in order for logp in kept[branch].logps])
        return float((ours.cpu().float() - theirs).abs().mean())

    # --- Adapters

    def sync(self, model: Any, step: int) -> None:
        """Have the servers sample under the adapter of `model`, PEFT's, as it is at this step; called by all processes
        alike. Between two of `sync_every` steps they keep the one that they have.

        Raises:
            EndpointError: a server that does not take it.
        """
        if self._engine.adapter is not None and step % self._config.sync_every:
            return
        name, before = f"{self._prefix}{step}", self._engine.adapter
        _as_one(lambda: self._give(model, name, before), first_only=True)
        self._engine.adapter = name

    def _give(self, model: Any, name: str, before: str | None) -> None:
        if before is None:
            self._unload_all()  # of a run that was killed
        self._engine.client.load_adapter(name, self._written(model, name))
        if before is not None:
            self._engine.client.unload_adapter(before)
            shutil.rmtree(self._folder / before)

    def _written(self, model: Any, name: str) -> Path:
        """The adapter in a folder of its own, whole from the moment that it has its name."""
        new, folder = self._folder / f"{name}.new", self._folder / name
        for old in (new, folder):
            shutil.rmtree(old, ignore_errors=True)
        model.save_pretrained(str(new), save_embedding_layers=False)
        os.replace(new, folder)
        return folder

    def _unload_all(self) -> None:
        for name in self._engine.client.adapters():
            if name.startswith(self._prefix):
                self._engine.client.unload_adapter(name)
        if PartialState().is_main_process:
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within, the servers are asked; afterwards they hold no adapter of this run. A server that has died since is
        named, and hides no error of the run itself."""
        try:
            yield
        finally:
            try:
                if PartialState().is_main_process:
                    self._unload_all()
            except EndpointError as error:
                print(f"the adapter of this run was not unloaded: {error}", file=sys.stderr, flush=True)
            self._engine.close()


def most_pictures(config: TrainConfig) -> int:
    """How many images a prompt of several looks shows at most; 0 where one look is the rule."""
    row = ZOOM_PROTOCOLS.get(config.protocol or "")
    return row.max_pictures if row else 0 if config.max_looks is None else config.max_looks + 1


def _untold(one: Completion) -> str | None:
    """Why a completion cannot be learned from; None where it can, or there is none."""
    if one.text is None:
        return None
    missing = [what for what, told in (("token ids (return_token_ids)", one.ids), ("logprobs", one.logps)) if not told]
    if not missing:
        return None
    return (
        f"it tells no {' and no '.join(missing)}, and what is learned from are the tokens as they were sampled; use a "
        "vLLM of 0.22 or later, or `visrl api`"
    )


def _as_one(work: Callable[[], None], first_only: bool = False) -> None:
    """Do something in every process, or in the first one while the others wait; where it fails in one, it fails in all.

    Raises:
        EndpointError: what failed, in the words of the first process in which it did.
    """
    error: str | None = None
    try:
        if PartialState().is_main_process or not first_only:
            work()
    except EndpointError as failed:
        error = str(failed)
    errors = gather_object([error])
    if found := next(filter(None, errors), None):
        raise EndpointError(found)
