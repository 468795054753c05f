"""`python -m luthier.cli`: the command line without its script."""

from luthier.cli import main

main()
