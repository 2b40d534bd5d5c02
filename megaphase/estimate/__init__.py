"""Estimates of memory and step time for a run's layout, and suggestions for layouts that fit."""
