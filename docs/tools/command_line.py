"""What the commands print for `--help`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os


def helps() -> dict[str, str]:
    """What ``python -m captum_concepts COMMAND --help`` prints, for each command, in the order of ``--help``."""
    from captum_concepts.__main__ import parser

    groups = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: _printed(parser(), [name, "--help"]) for name in groups[0].choices}


def _printed(parser: argparse.ArgumentParser, arguments: list[str]) -> str:
    found = io.StringIO()
    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ.update(COLUMNS="84", NO_COLOR="1")  # argparse wraps at the terminal's width; Python 3.14 colours
    try:
        with contextlib.redirect_stdout(found), contextlib.suppress(SystemExit):
            parser.parse_args(arguments)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return found.getvalue().rstrip()
