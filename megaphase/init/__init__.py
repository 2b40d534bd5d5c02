"""`megaphase init`: a commented run file from a few answers."""
