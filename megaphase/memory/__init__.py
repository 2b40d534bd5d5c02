"""How much memory a layout needs on each GPU, computed without building anything.

`setup_of` gathers what it depends on, `estimate` computes it, `layouts` and `advice` compare.
"""
