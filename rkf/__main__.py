"""`python -m rkf` is the command `rkf`."""

from rkf.cli import main

main()
