"""Sweeps: compare several training recipes with one budget by trial runs, and report on them."""
