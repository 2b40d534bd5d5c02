"""Fault tolerance: heartbeats, fault detection, stack dumps and stop signals of a job's ranks."""
