"""Rewards: what a look and an answer are worth, and what results add up to.

open            the table of critics, and which one a config means
open_judge      which judge a config means
critic          critics: the oracle of drawn scenes, and a model that is asked for scores
outcome         a box is as good as the answers from its crop: critic: outcome, and what grades them
grader          a grader of your own, module:function
judge           judging answers with a language model
reply_scores    the score in a critic's or judge's reply
metrics         string metrics of answers: exact, relaxed, ANLS, VQA
choices         multiple choice: which option a reply names
dual_iou        recall and precision of boxes where there are several true ones
detection       whether a box is right
grounding       whether it is on the right object, and whether its crop holds the evidence
parts           the reward of online reinforcement: a weighted sum of named parts
open_parts      its parts, each opened once for a run: models, servers, functions of your own
reward_model    a reward model as a part, model:PATH, which scores boxes and answers in one packed pass
asked_parts     parts that a model is asked about: the judge, the critic
reward_function a function of your own as a part, module:function, called as TRL calls it
advantages      how much better a response is than the others of its group, for boxes and for answers

results         the row of one question, and the summary of rows
scored          greedy rollouts and their results at once: evaluations, training curves, checkpoints of a loop
crop_effects    grounded and right, crop gain and crop harm, over rows
"""
