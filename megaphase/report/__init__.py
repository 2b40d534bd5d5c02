"""Reports of runs: plots, tables and pages."""
