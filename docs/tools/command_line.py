"""The command line page, written by the parser itself."""

from __future__ import annotations

import argparse
import os


def sub_commands() -> dict[str, argparse.ArgumentParser]:
    """Name -> parser, in the order of ``--help``."""
    from captum_concepts.__main__ import parser

    actions = parser()._actions
    groups = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    return dict(groups[0].choices)


def render(markdown: str) -> str:
    """A page in which ``{{ command line }}`` is every command's help."""
    if "{{ command line }}" not in markdown:
        return markdown
    os.environ["COLUMNS"] = "100"  # argparse wraps at the terminal's width
    os.environ["NO_COLOR"] = "1"  # Python 3.14 colours help
    parts = [f"## {name}\n\n```text\n{one.format_help().rstrip()}\n```\n" for name, one in sub_commands().items()]
    return markdown.replace("{{ command line }}", "\n".join(parts))
