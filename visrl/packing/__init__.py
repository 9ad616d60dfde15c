"""Sequence packing: what training and decoding share.

tree      token sequences → prefix tree: a shared prefix is there once
pack      prefix trees → packed sequences under ancestor masks
rows      rows of the plain form, for models that take no prefix tree, in the same class
lay_out   which of the two it is
forward   the model's own forward over them: log-probabilities of response tokens
"""
