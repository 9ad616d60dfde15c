"""Self-evolution: `visrl.evolve(…)` is `visrl.evolve.loop.run_evolve`.

config          the keys of generate, filter, evolve and demo
loop            iterations of generate → filter → stage 1 → stage 2: `visrl evolve`; demo is `visrl demo`
generate        samples → trajectories → verdicts; batches is what is resumed and sharded, tokens what it costs
filter          verdicts → preferences; pairs is Algorithm 1's rule, losers the others, turns those of several looks;
                pairs_page and turns_page the pages
papers_rule     what the paper's critic and rule keep of the same tries, for comparison
check           whether a critic is worth asking
serving         generation in shards, and behind a server that is started for its policy
look_lessons    several looks in the demo: online reinforcement, evaluation before and after
training        the two stages of an iteration, and online reinforcement beside them
scores          checkpoints on held-out questions, and summary.json
clock           seconds and memory of the steps
"""

from visrl.callable_package import make_callable

make_callable(__name__, "loop", "run_evolve")
