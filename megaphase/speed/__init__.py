"""How long a step takes, and what share of the hardware it uses, computed without running anything.

`cards` and `hardware` say what the GPUs and their links can do, `work` what a rank computes,
`communication` what it sends; `estimate` adds them up, and `table` says it. What is assumed, and
how far the result is from published runs, stands in docs/scaling.md.
"""
