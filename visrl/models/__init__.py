"""Models: checkpoints, their families, and conversations as tokens and pixels.

families         what differs between model families, in one table; family is what its entries are made of
positions, masks what its entries name: where tokens stand, what they see; pixels: image processors with pixel limits;
                 own_positions: those that only a model's own method finds
parts, calls     the parts of a model, and what its own forward takes
encode           chat template, tokenizer and image processor: conversation → token ids and pixels; in prefix trees
                 (tree_encoder), or as whole rows of the checkpoint's own processor (plain_encoder)
tool_turns       conversations as chat templates take them, with tools; whether a template shows these
probe            whether the model of a checkpoint takes a prefix tree, found by trial; asked: the trial's prompts
candidates       what processor, signature and config say of a model; found is what was found of it, as data, derive
                 makes a family of that
proof, proofs    what it takes, held against its own calls; the cache of what was found
small, trial     the small copy of a config; the tree of a trial
attention        attention under ancestor masks: SDPA, blocks, FlexAttention
recurrent        recurrent layers over packed trees, state by state; tree_runs says in which calls
load             model, processor and settings of a folder, with a clear sentence where that cannot be done
adapters, chain  LoRA and its like: merging them, and which were trained on which
folder           what must be true of a folder before a library reads it
prompting        what a chat template must do; template_trial tries one in a process of its own
router           router losses of mixtures of experts, over sequences that share tokens
value_head       a scalar head on a model: of reward models, and of PPO
settings         pixel limits, crop rule and box codec beside the weights
modes, tokens    evaluation mode for a while; token counts for statistics
tiny/            the embedded model
"""
