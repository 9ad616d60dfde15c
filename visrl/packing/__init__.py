"""Sequence packing: what training and decoding share.

tree      token sequences → prefix tree: a shared prefix is there once
pack      prefix trees → packed sequences under ancestor masks
forward   the model's own forward over them: log-probabilities of response tokens
"""
