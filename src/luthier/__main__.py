"""`python -m luthier`: the command line without its script."""

from luthier.cli import main

main()
