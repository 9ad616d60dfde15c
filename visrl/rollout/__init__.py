"""Rollouts: where to look, then what is there, asked of a policy.

`protocols` puts a question in two steps, `steps` takes them, one value at a time. `rollout` samples them in batches,
`greedy` takes them at temperature 0, with the controls of `controls` in place of the policy's box; `serve.focus` takes
them for one request. `episodes` asks for several looks at each question, `trees` makes trajectories of what they say.
`diversity` keeps the two boxes of a round apart.
"""
