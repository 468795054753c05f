"""Families whose blocks run as one function each: what a block of theirs is made of."""
