"""Training: `visrl.train(…)` is `visrl.train.run.train`."""

from visrl.callable_package import make_callable

make_callable(__name__, "run", "train")
