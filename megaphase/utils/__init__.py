"""Small helpers without a subject of their own: files, locks, JSON records, progress, errors."""
