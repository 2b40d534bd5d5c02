"""`megaphase doctor`: what of this machine or node works, each line with its remedy."""
