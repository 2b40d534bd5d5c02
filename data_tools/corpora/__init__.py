"""Commands that inspect, verify, merge, split and shuffle corpora."""
