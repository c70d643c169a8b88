"""What the command lines of all experiments have in common."""

import argparse


def command_line(description: str | None, *, quick: str) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring, with the option --quick.

    Args:
        description: the docstring.
        quick: what that option does.

    Returns:
        The parser, for further options.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser
