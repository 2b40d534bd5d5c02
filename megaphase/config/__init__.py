"""Reads, overrides and checks the run file; every error names the file and the key's path.

`load.load_run_file` is the only way in: it reads YAML 1.2 (so that the task `no` stays Norwegian
and `200e9` is a number), applies `key.path=value` overrides and checks all that can be checked
without looking at a corpus or at the world size.

A section's class is in the package of the component that it configures, and imports nothing of
this package but `fields`; `run` and `phases` compose these classes. None of them imports torch.
"""
