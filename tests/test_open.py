"""One way to open a model: what reads a checkpoint's settings, makes an encoder or an engine, or names a server."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1] / "visrl"
# What opens a model, and the files that may: everybody else goes through engines/open.py.
ALLOWED = {
    r"\bload_encoder\(": {"engines/open.py", "engines/local.py"},
    r"\bLocalEngine\.load\(": {"engines/open.py"},
    r"\bEndpointEngine\(": {"engines/open.py"},
    r"\bEndpoint\(": {"engines/open.py", "engines/server_process.py"},
    # export: of an adapter already read; a reward model: of what is refused as a policy
    r"\bModelSettings\.load\(": {"engines/open.py", "train/export.py", "rewards/reward_model.py"},
    r"\bload_merged\(": {"engines/local.py", "train/model.py", "train/export.py"},  # weights alone: the seam
}


def test_models_are_opened_in_one_place():
    for pattern, allowed in ALLOWED.items():
        callers = {
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*.py")
            if not path.is_relative_to(ROOT / "models")
            and re.search(rf"^(?!\s*(?:def|class) ).*{pattern}", path.read_text(encoding="utf-8"), flags=re.M)
        }
        assert callers == allowed, pattern
