"""Self-evolution's sampling: the engine of this process against vLLM on this machine, on the same questions.

    make vllm-env
    python benchmarks/generation_vllm.py --shapes embedded,small --threads 1 --repeats 2 --json vllm.json

Both draw N = 5 rounds of two boxes and an answer from each crop, by the same rollout code, in turns, with as many
threads of torch; vLLM's server and our client have processes of their own beside them. Start-up is apart: until the
model is loaded here, and until vLLM is healthy. On random models every text has its full length and boxes are written
by a script, as in generation.py; `cpu` is the processor time of all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from generation import ANSWER_TOKENS, BOX_TOKENS, NEVER, Scripted, Setting, boxes_of, settings_of

from visrl.engines.endpoint import EndpointEngine
from visrl.engines.local import LocalEngine
from visrl.engines.openai_server import Endpoint
from visrl.engines.server_process import free_port, served, vllm_command
from visrl.models.load import load_encoder, load_model
from visrl.rollout.rollout import RolloutSettings, roll_out

NAME = "policy"
BIN = Path(__file__).parents[1] / ".venv-vllm" / "bin"


@contextmanager
def vllm(setting: Setting, folder: Path, threads: int, more: list[str]) -> Iterator[tuple[EndpointEngine, float]]:
    """The policy behind a vLLM of so many threads, and the seconds until it was healthy."""
    os.environ |= {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    encoder, port = load_encoder(setting.folder, setting.settings), free_port()
    more = ["--dtype", "float32", "--max-model-len", "2048", *more]
    command = vllm_command(str(setting.folder), encoder, port, served_name=NAME, max_images=2, more=more)
    start = time.perf_counter()
    with served(command, port, NAME, folder / f"{setting.name}.log") as url:
        seconds = time.perf_counter() - start
        body = {"ignore_eos": True} if setting.random else {}
        # A prompt that is split between two steps ends vLLM 0.32 on a CPU, where its request has a seed.
        endpoint = Endpoint((url,), NAME, concurrency=64, extra_body=body, omit_fields=("seed",))
        engine = EndpointEngine(endpoint, encoder.codec, encoder)
        engine.check()
        try:
            yield engine, seconds
        finally:
            engine.close()


def processor_seconds() -> float:
    """Of this process and all that it has started."""
    own = psutil.Process()
    times = [one.cpu_times() for one in (own, *own.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def measure(setting: Setting, rounds: int, repeats: int, batch: int, there: EndpointEngine) -> dict[str, Any]:
    """Seconds, processor seconds and tokens a second of both, batches of both in turns."""
    start = time.perf_counter()
    here = LocalEngine(load_model(setting.folder).eval(), load_encoder(setting.folder, setting.settings))
    loading = time.perf_counter() - start
    if setting.random:
        here.encoder.end_id = NEVER
    boxes = boxes_of(2 * rounds)
    engines = {"ours": here, "vllm": there}
    players = {name: Scripted(engine, boxes, scripted=setting.random) for name, engine in engines.items()}
    rolling = RolloutSettings(rounds=rounds, temperature=1.0, diversity=False)
    parts = [setting.samples[first : first + batch] for first in range(0, len(setting.samples), batch)]
    for player in players.values():  # warm
        roll_out(player, setting.samples[-1:], rolling)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in players}
    for _ in range(repeats):
        spent = {name: Counter[str]() for name in players}
        for part in parts:
            for name, player in players.items():
                here.encoder.forget()
                begun, used, sampled = time.perf_counter(), processor_seconds(), Counter[str]()
                roll_out(player, part, rolling, sampled=sampled)
                if setting.random:  # the script's boxes hide how many tokens were sampled: all that were allowed
                    sampled = Counter(tokens=len(part) * 2 * rounds * (BOX_TOKENS + ANSWER_TOKENS))
                spent[name].update(
                    seconds=time.perf_counter() - begun, cpu=processor_seconds() - used, tokens=sampled.total()
                )  # type: ignore[call-arg]
        for name, all_of in spent.items():
            runs[name].append({key: round(value, 2) for key, value in all_of.items()})
    return {
        "shape": setting.name, "questions": len(setting.samples), "rounds": rounds, "together": batch,
        "load_s": round(loading, 1), "runs": runs,
        "tokens_per_s": {
            name: [round(run["tokens"] / run["seconds"], 1) for run in own] for name, own in runs.items()
        },
        "times_faster_here": round(
            statistics.median(b["seconds"] / a["seconds"] for a, b in zip(runs["ours"], runs["vllm"], strict=True)), 2
        ),
    }  # fmt: skip


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default="embedded,small")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="questions rolled out together; 8 times as many: embedded")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vllm-args", default="--enforce-eager", help="more of vLLM's own arguments")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.shapes.split(","):
            many = 8 if name == "embedded" else 1
            setting = settings_of(name, Path(folder), many * given.questions)
            with vllm(setting, Path(folder), given.threads, given.vllm_args.split()) as (engine, seconds):
                row = measure(setting, given.rounds, given.repeats, many * given.batch, engine)
            found.append({"threads": given.threads, "vllm_start_s": round(seconds, 1), **row})
            print(json.dumps(found[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
