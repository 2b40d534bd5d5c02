"""Heartbeats, fault detection, stack dumps and stop signals of the ranks of a job."""
