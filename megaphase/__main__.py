"""`python -m megaphase`."""

from megaphase.cli import main

main()
