"""Evaluation: `visrl.evaluate(…)` is `visrl.evaluate.run.evaluate`.

run             `visrl eval`: from a config to scores
config          its keys
benchmarks      the table of benchmarks; one of your own is module:NAME
questions       reading questions; viscot reads Visual-CoT's and RefCOCO's
inference       asking a policy, resumable
judging         judging its answers
results         reading result files; their rows are rewards.results

rules           every published rule on replies, by its source; toolkit_rules are VLMEvalKit's and lmms-eval's

compare         two checkpoints on the same questions: `visrl eval compare`
tables          scores as text
answers         scoring answer files of other programs, boxfiles their boxes, predictions reads both
published       what others published
leaderboard     our results among them, as a page
ask             `visrl ask`
"""

from visrl.callable_package import make_callable

make_callable(__name__, "run", "evaluate")
