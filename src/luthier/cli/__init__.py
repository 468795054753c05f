"""The command line: parse, call, print. Every command is one question of a user, in the file of its kind."""

from luthier.cli import inputs, job, templates, use
from luthier.cli.app import app, main

__all__ = ["app", "inputs", "job", "main", "templates", "use"]
