"""Runs as SLURM jobs: checked, submitted, queued again, watched."""
