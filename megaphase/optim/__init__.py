"""The optimizer, learning-rate schedules, and optimizer state under every ZeRO stage."""
