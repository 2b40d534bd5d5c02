"""What one or several runs have shown: their records, figures and report pages."""
