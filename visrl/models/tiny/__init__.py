"""The embedded model: a tiny Qwen2-VL with a tokenizer and a processor of its own, loadable offline.

`make.py` draws its random start. `pretrain.py` gives it what real models bring along: `recipe.py` has the keys of
`configs/tiny/pretrain.yaml`, `lessons.py` draws what each step shows, `rows.py` makes token rows of it, `readouts.py`
asks hidden states what they hold. `configs/tiny/train_sft.yaml` is its warm-up. `checkpoint/` holds the result with log
and manifest of its warm-up, and the log of its pre-training. `looks/` is the same model after a second warm-up, on
scenes that need no look, one or two (`configs/tiny/train_looks.yaml`), with log and manifest.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
LOOKS_CHECKPOINT = Path(__file__).parent / "looks"
