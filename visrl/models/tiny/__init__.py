"""The embedded model: a tiny Qwen2-VL with a tokenizer and a processor of its own, loadable offline.

`make.py` draws its random start; `configs/tiny/train_sft.yaml` is the recipe that warms it up; `checkpoint/` holds the
result with the manifest of the run that made it.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
