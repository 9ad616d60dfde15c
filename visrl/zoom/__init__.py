"""Several looks: how the public protocols ask for a crop, what they show of it, and when they end.

written     the tags, JSON and numbers that calls are written in
calls       what one turn of a model asks for: calls, an answer, or a call that cannot be read
tool_calls  calls of tools in a turn as it grows, whatever the tool
windows     from the numbers of a call to pixels of a picture, and the size at which a crop is shown
protocols   ZOOM_PROTOCOLS, one row each: prompts, coordinates, observations, errors, limits
config      the keys of several looks that verbs share
handed      a zoom tool that the caller executes, in its protocol's words
episode     an episode as a pure state: a turn goes in, the next conversation or the end comes out

The texts in prompts.json are what public checkpoints were trained on, to the letter. Nothing here knows engines or
scores.
"""
