"""`python -m tqcompile COMMAND`: the commands, each with its own `--help`."""

import argparse
import sys
from collections.abc import Sequence

from tqcompile.bench import command as bench
from tqcompile.bench import tune
from tqcompile.explain import command as explain
from tqcompile.paper import command as paper
from tqcompile.sweep import command as sweep
from tqcompile.validate import command as validate

COMMANDS = (bench, explain, paper, sweep, tune, validate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tqcompile", description="What the package does on its own.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
