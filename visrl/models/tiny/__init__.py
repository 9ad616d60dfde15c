"""The embedded model: a tiny Qwen2-VL with a tokenizer and a processor of its own, loadable offline.

`make.py` draws its random start; `configs/tiny/train_sft.yaml` and `train_sft_2.yaml` are the recipe that warms it up;
`checkpoint/` holds the result with the manifest of the run that made it (docs/tiny/: those of the run before).
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
