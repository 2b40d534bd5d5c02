"""Start runs as several processes on this machine or as SLURM jobs, and the demo."""
