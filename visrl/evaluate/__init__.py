"""Evaluation: `visrl.evaluate(…)` is `visrl.evaluate.run.evaluate`."""

from visrl.callable_package import make_callable

make_callable(__name__, "run", "evaluate")
