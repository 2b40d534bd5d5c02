"""Rehearsal: the run's own code as one rank of many, on a GPU that does not exist.

Tensors on the device "cuda" have shapes, types and storages but no values (torch's FakeTensorMode);
tensors on the CPU are real. Every kernel, collective, copy and wait of the host is recorded.
Nothing here measures time or checks a number: see docs/rehearsal.md.
"""
