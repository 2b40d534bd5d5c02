"""Laws of the losses, fitted to the runs of sweeps, and recommendations for other runs."""
