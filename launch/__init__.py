"""Start runs: several processes on this machine, and the demo."""
