"""General-purpose helpers: files, locks, JSON records, progress, errors."""
