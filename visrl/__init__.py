"""visrl: teach a vision-language model where to look.

The library's front door: `NAMES` is its map, from every public name to the module that defines it. A name is imported
when it is first used, so `import visrl` costs nothing: no torch, no transformers, not one module of this package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name → module, or module:name where it is called otherwise there. Names that are packages too (train, evaluate,
# evolve, serve, report) can be called: see callable_package.py.
NAMES = {
    # Policy, rollouts, rewards
    "load_policy": "visrl.policy",
    "LoadedPolicy": "visrl.policy",
    "Look": "visrl.rollout.steps",
    "ask": "visrl.policy",
    "roll_out": "visrl.rollout.rollout",
    "RolloutSettings": "visrl.rollout.rollout",
    "score": "visrl.policy",
    "make_pairs": "visrl.evolve.pairs",
    # Records
    "Box": "visrl.box",
    "iou": "visrl.box",
    "Sample": "visrl.records",
    "Picture": "visrl.records",
    "Trajectory": "visrl.records",
    "Verdict": "visrl.records",
    "Preference": "visrl.records",
    "read_samples": "visrl.data.sources",
    "read_preferences": "visrl.data.sources",
    "read_records": "visrl.data.native",
    "write_records": "visrl.records",
    "read_results": "visrl.evaluate.results",
    "summarise": "visrl.rewards.results",
    # Verbs
    "demo": "visrl.evolve.demo:run_demo",
    "train": "visrl.train",
    "generate": "visrl.evolve.generate",
    "filter": "visrl.evolve.filter:filter_pairs",
    "evolve": "visrl.evolve",
    "export": "visrl.train.export",
    "evaluate": "visrl.evaluate",
    "compare": "visrl.evaluate.compare",
    "leaderboard": "visrl.evaluate.leaderboard:write_leaderboard",
    "score_answer_files": "visrl.evaluate.answers",
    "score_box_files": "visrl.evaluate.boxfiles",
    "judge": "visrl.evaluate.judging:judge_answers",
    "agree": "visrl.evaluate.judging",
    "serve": "visrl.serve",
    "report": "visrl.report",
    "convert": "visrl.data.convert",
    "check": "visrl.data.check",
    "stats": "visrl.data.stats:measure",
    # Configs and settings
    "PolicyConfig": "visrl.engines.open",
    "CriticConfig": "visrl.rewards.open",
    "DemoConfig": "visrl.evolve.config",
    "GenerateConfig": "visrl.evolve.config",
    "FilterConfig": "visrl.evolve.config",
    "FilterSettings": "visrl.evolve.pairs",
    "EvolveConfig": "visrl.evolve.config",
    "TrainConfig": "visrl.train.config",
    "ExportConfig": "visrl.train.export",
    "EvalConfig": "visrl.evaluate.config",
    "ServeConfig": "visrl.serve.config",
    "Reading": "visrl.data.formats",
    "Selection": "visrl.data.convert",
    "Sizes": "visrl.data.sizes",
    "LeaderboardEntry": "visrl.evaluate.leaderboard",
    # Extensions, named module:NAME in a config
    "Loss": "visrl.train.losses",
    "DataFormat": "visrl.data.formats",
    "Benchmark": "visrl.evaluate.benchmarks",
    # Errors
    "UserError": "visrl.errors",
}

__all__ = ["__version__", *NAMES]

if TYPE_CHECKING:  # the same names for type checkers and editors
    from visrl.box import Box as Box
    from visrl.box import iou as iou
    from visrl.data.check import check as check
    from visrl.data.convert import Selection as Selection
    from visrl.data.convert import convert as convert
    from visrl.data.formats import DataFormat as DataFormat
    from visrl.data.formats import Reading as Reading
    from visrl.data.native import read_records as read_records
    from visrl.data.sizes import Sizes as Sizes
    from visrl.data.sources import read_preferences as read_preferences
    from visrl.data.sources import read_samples as read_samples
    from visrl.data.stats import measure
    from visrl.engines.open import PolicyConfig as PolicyConfig
    from visrl.errors import UserError as UserError
    from visrl.evaluate.answers import score_answer_files as score_answer_files
    from visrl.evaluate.benchmarks import Benchmark as Benchmark
    from visrl.evaluate.boxfiles import score_box_files as score_box_files
    from visrl.evaluate.compare import compare as compare
    from visrl.evaluate.config import EvalConfig as EvalConfig
    from visrl.evaluate.judging import agree as agree
    from visrl.evaluate.judging import judge_answers
    from visrl.evaluate.leaderboard import LeaderboardEntry as LeaderboardEntry
    from visrl.evaluate.leaderboard import write_leaderboard
    from visrl.evaluate.results import read_results as read_results
    from visrl.evaluate.run import evaluate as evaluate
    from visrl.evolve.config import DemoConfig as DemoConfig
    from visrl.evolve.config import EvolveConfig as EvolveConfig
    from visrl.evolve.config import FilterConfig as FilterConfig
    from visrl.evolve.config import GenerateConfig as GenerateConfig
    from visrl.evolve.demo import run_demo
    from visrl.evolve.filter import filter_pairs
    from visrl.evolve.generate import generate as generate
    from visrl.evolve.loop import run_evolve
    from visrl.evolve.pairs import FilterSettings as FilterSettings
    from visrl.evolve.pairs import make_pairs as make_pairs
    from visrl.policy import LoadedPolicy as LoadedPolicy
    from visrl.policy import ask as ask
    from visrl.policy import load_policy as load_policy
    from visrl.policy import score as score
    from visrl.records import Picture as Picture
    from visrl.records import Preference as Preference
    from visrl.records import Sample as Sample
    from visrl.records import Trajectory as Trajectory
    from visrl.records import Verdict as Verdict
    from visrl.records import write_records as write_records
    from visrl.report.page import report as report
    from visrl.rewards.open import CriticConfig as CriticConfig
    from visrl.rewards.results import summarise as summarise
    from visrl.rollout.rollout import RolloutSettings as RolloutSettings
    from visrl.rollout.rollout import roll_out as roll_out
    from visrl.rollout.steps import Look as Look
    from visrl.serve.config import ServeConfig as ServeConfig
    from visrl.serve.runner import serve as serve
    from visrl.train.config import TrainConfig as TrainConfig
    from visrl.train.export import ExportConfig as ExportConfig
    from visrl.train.export import export as export
    from visrl.train.losses import Loss as Loss
    from visrl.train.run import train as train

    # Called otherwise where they are defined.
    demo, filter, evolve, stats = run_demo, filter_pairs, run_evolve, measure
    judge, leaderboard = judge_answers, write_leaderboard

if not TYPE_CHECKING:  # type checkers would take any name for one that this knows

    def __getattr__(name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(f"module 'visrl' has no attribute {name!r}")
        path, _, attribute = NAMES[name].partition(":")
        module = import_module(path)
        return module if path == f"{__name__}.{name}" else getattr(module, attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *NAMES})
