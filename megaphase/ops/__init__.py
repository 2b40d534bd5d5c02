"""The parts of a block between its matrix products, each a formula forward and one backward.

What autograd keeps for a part is chosen here by hand, so that it is the same, and known, whether
its formulas are computed operation by operation or compiled.
"""
