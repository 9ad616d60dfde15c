"""The embedded model: a tiny Qwen2-VL with a tokenizer and a processor of its own, loadable offline.

`make.py` draws its random start. `pretrain.py` gives it what real models bring along: `recipe.py` has the keys of
`configs/tiny/pretrain.yaml`, `lessons.py` draws what each step shows, `rows.py` makes token rows of it, `readouts.py`
asks hidden states what they hold. `configs/tiny/train_sft.yaml` is its warm-up. `checkpoint/` holds the result with log
and manifest of its warm-up, and the log of its pre-training.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
