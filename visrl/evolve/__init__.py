"""Self-evolution: `visrl.evolve(…)` is `visrl.evolve.loop.run_evolve`."""

from visrl.callable_package import make_callable

make_callable(__name__, "loop", "run_evolve")
