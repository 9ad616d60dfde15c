"""Serving: `visrl.serve(…)` is `visrl.serve.runner.serve`."""

from visrl.callable_package import make_callable

make_callable(__name__, "runner", "serve")
