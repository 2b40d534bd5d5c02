"""Run trainings as SLURM jobs: check, submit, requeue, and show their status."""
