"""`python -m vora.cli`, as torchrun starts it."""

from vora.cli import main

main()
