"""Training: `visrl.train(…)` is `visrl.train.run.train`.

run             from a config to a trained checkpoint
config          the keys; fields is the table of transformers.TrainingArguments, arguments makes those of a run
losses          the table of losses, each a pure function of log-probabilities
trainer         transformers.Trainer over packed sequences

reward_model    the trainer of `stage: rm`: scores of responses, from preferences
value_head      what trainers need whose model has a value head

online          online reinforcement: the same trainer, whose batches are sampled from its live weights
online_config   its keys
online_rollouts what a step samples: rollouts, rewards, advantages, packed
online_turns    the same where the model looks several times: a tree of turns for every question
responses       a sampled text with its prompt and its advantage
online_losses   its losses
rollout_servers servers that sample in its place, and get its adapter; importance weighs what they sampled
online_watch    what people watch of a step: its measures, and the row of the journal; turn_watch of several looks
show_rollouts   the last step's rollouts as a page and a table; rollout_cards draws and crops
ppo, ppo_config the same with a value head, and its keys

data            data sets of items; curriculum is the warm-up's
rows, items     a sample or preference as rows with responses; their collation into a packed batch
sampler         items of one image in one batch
model           weights, adapter, what is frozen
reference       reference log-probabilities, computed once and cached
features        image features kept over epochs
distributed     several processes: DDP, and what FSDP and DeepSpeed start

dry_run         items, tokens, steps, drops and memory before anything is trained
checkpoints     which is whole, and where a resumed run goes on
identity        which training a folder holds
log             running means, log.jsonl, curves
export, card    `visrl export` and the model card it writes
"""

from visrl.callable_package import make_callable

make_callable(__name__, "run", "train")
