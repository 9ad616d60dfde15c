"""Several processes that train one model: who they are, how they are started, and how their results come together."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from visrl.errors import UserError

Argument = TypeVar("Argument")
HANDLED = "SIGTERM,SIGHUP,SIGQUIT"  # by torch's launcher; SIGINT by us
PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


class ProcessError(UserError, RuntimeError):
    """One of the processes that train together failed; the message is its own."""


def launched() -> bool:
    """Whether this process is one of several that were started together (by us, torchrun or accelerate)."""
    return "LOCAL_RANK" in os.environ


def shards_weights(arguments: TrainingArguments) -> bool:
    """Whether weights are split over the processes, so that no part of the model can be called by itself."""
    by_launcher = any(os.environ.get(name) == "true" for name in SHARDING)
    return by_launcher or bool(arguments.fsdp or arguments.deepspeed)


@contextmanager
def sharding_forgotten() -> Iterator[None]:
    """Leaves what is said of FSDP and DeepSpeed in the environment as it was: accelerate notes there what one training
    asks for, and the next one in this process would take it for its launcher's."""
    before = {name: os.environ.get(name) for name in SHARDING}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Every weight whole on every process: ZeRO-3 splits them at loading and joins them only once training began."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


def processes_wanted(given: int | None) -> int:
    """How many processes a training is to have on this machine: as given, else one for each GPU."""
    return given if given is not None else max(1, torch.cuda.device_count())


def on_processes(count: int, work: Callable[[Argument], Any], argument: Argument) -> None:
    """Run `work(argument)` in `count` processes of one group; both must be importable and picklable. They end with
    this process, however it ends.

    Raises:
        ProcessError: one of them failed.
        KeyboardInterrupt, SystemExit: this process was told to end (SIGINT; SIGTERM and its like).
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Releases of torch before 2.9 take no such choice, and end the processes by SIGINT with their tracebacks.
    chosen: dict[str, Any] = (
        {"signals_to_handle": HANDLED} if "signals_to_handle" in LaunchConfig.__dataclass_fields__ else {}
    )
    settings = LaunchConfig(
        **chosen, min_nodes=1, max_nodes=1, nproc_per_node=count, run_id="visrl", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0,
    )  # fmt: skip
    asked: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        asked.append(number)
        raise SignalException("interrupted", signal.SIGTERM)  # which ends Python without a traceback, SIGINT does not

    in_main = threading.current_thread() is threading.main_thread()
    # The launcher leaves its handlers behind, which raise an exception of torch's wherever this process is by then.
    signals = (signal.SIGINT, *(signal.Signals[name] for name in HANDLED.split(",")))
    before = {number: signal.getsignal(number) for number in signals}
    if in_main:
        signal.signal(signal.SIGINT, interrupt)
    try:
        elastic_launch(settings, _ending_with_parent)(work, argument, os.getpid())
    except SignalException as error:
        if asked or error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        print(f"visrl: ended by {error.sigval.name}; the same command goes on where this one stopped", file=sys.stderr)
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message: Any = failure.message
        text = message["message"] if isinstance(message, dict) else message
        raise ProcessError(f"process {rank} of {count}: {text}") from error
    finally:
        if in_main:
            for number, handler in before.items():
                signal.signal(number, handler)


def _ending_with_parent(work: Callable[[Argument], Any], argument: Argument, parent: int) -> None:
    """`work(argument)`, unless the process that wanted it has ended, and no longer than that one lives."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # to return would be to wait for the parent to read what is returned
    work(argument)


def say(text: str) -> None:
    """Print on the first process only."""
    if PartialState().is_main_process:
        print(text, flush=True)


def shard_batches(batches: Sequence[Any]) -> list[tuple[Any, bool]]:
    """This process's part of `batches`, and whether each counts: all get equally many, as processes that share a
    model must call it equally often, so some see a batch again that is another's."""
    state = PartialState()
    rounds = -(-len(batches) // state.num_processes)
    mine = [state.process_index + n * state.num_processes for n in range(rounds)]
    return [(batches[n % len(batches)], n < len(batches)) for n in mine]


def gather_dicts(values: dict[str, Any]) -> dict[str, Any]:
    """The entries of every process's dictionary in one."""
    return {key: value for part in gather_object([values]) for key, value in part.items()}
