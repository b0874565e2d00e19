"""Command line: ``python -m captum_concepts COMMAND --help``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from captum_concepts import __version__
from captum_concepts.commands.command_line import Outcome, add_commands, explainer_options, run_command
from captum_concepts.errors import CaptumConceptsError, CaptumConceptsWarning, InputError, printable

NOT_DONE, CRASHED, INTERRUPTED, TERMINATED = 2, 70, 130, 143
EPILOG = """\
exit codes: 0 success; 1 success, but some images could not be read (they are listed); 2 failure, or the result could
not be written (the message gives the reason); 70 unexpected error, with its traceback; 130 interrupted (Ctrl-C), 143
terminated (SIGTERM); files already written are complete, and listed.
"""

EXPLAIN_EXAMPLES = (
    r"""examples:
  # the classes of a torchvision model (downloads its weights)
  python -m captum_concepts explain photo.jpg --model resnet50 --weights pretrained --output out
  # a model without a classifier head: similarity to the prototypes of your classes, one folder of images each
  python -m captum_concepts explain photos/ --model resnet50 --weights FILE.safetensors --references classes/ \
      --output out
  # which of your text concepts it detected, where, and how much each changed the prediction
  python -m captum_concepts explain photos/ --model resnet50 --weights pretrained --words "stripes, grass, sky" \
      --encoder ViT-B-32 --encoder-weights openai --train images/ --explainer words.safetensors --output out
  # also write all explanations to one HTML page, and save them
  python -m captum_concepts explain photos/ --model resnet50 --weights pretrained --output out --save \
      --report out/report.html
  # your own network: a function in a Python file that returns a torch.nn.Module taking RGB in [0, 1]
  python -m captum_concepts explain photos/ --model my_model.py:build --layer backbone.layer4 --output out

"""
    + EPILOG
)


FIT_SALF_EPILOG = """\
exit codes: 0 success; 1 success, but some images could not be read (they are listed); 2 failure (the message gives the
reason); 70 unexpected error; 130 interrupted, 143 terminated: completed work is kept, and the same command resumes.
"""


class _HelpWithConfiguration(argparse.Action):
    """Help option whose epilog is only built on demand, as it imports half of the package."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from captum_concepts.commands.fit_salf_config import help_text

        parser.epilog = help_text() + FIT_SALF_EPILOG
        parser.print_help()
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Argument parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m captum_concepts",
        description="What concepts a vision model detected, where they are in the image, and how much each changed the "
        "prediction.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    top.add_argument("--version", action="version", version=f"captum_concepts {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="explain synthetic scenes with the bundled models", epilog=EPILOG, formatter_class=raw
    )
    demo.add_argument("--output", default="demo_output", help="folder for the figures (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="random seed of the scenes (default: %(default)s)")
    demo.add_argument(
        "--photos", metavar="FOLDER", help="explain these photographs instead, offline, with a real ImageNet network"
    )
    demo.add_argument("--json", action="store_true", help="print the table as JSON")

    explain = commands.add_parser(
        "explain", help="explain your own images", epilog=EXPLAIN_EXAMPLES, formatter_class=raw
    )
    explain.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    explainer_options(explain)
    explain.add_argument("--top-k", type=int, default=3, help="concepts shown per image (default: %(default)s)")
    explain.add_argument("--output", required=True, help="folder for the figures and explanations.json")
    explain.add_argument("--report", metavar="FILE.html", help="also write one HTML page of all images")
    explain.add_argument("--title", help="title of that page")
    explain.add_argument("--save", action="store_true", help="also save each explanation as NAME.safetensors")
    explain.add_argument("--json", action="store_true", help="print explanations.json instead of a table")

    add_commands(commands, epilog=EPILOG, formatter_class=raw)

    fit_salf = commands.add_parser(
        "fit-salf",
        help="train a classifier that decides through concept maps (SALF-CBM)",
        formatter_class=raw,
        add_help=False,
    )
    fit_salf.add_argument(
        "-h", "--help", action=_HelpWithConfiguration, nargs=0, default=argparse.SUPPRESS, help="show an example"
    )
    fit_salf.add_argument("--config", required=True, metavar="FILE", help="what to fit, JSON; see the example")
    fit_salf.add_argument(
        "--dry-run", action="store_true", help="print the disk space, time and machines needed; write nothing"
    )
    fit_salf.add_argument("--json", action="store_true", help="print the report (or plan) as JSON")
    return top


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which schedulers and containers end a process; it is handled like Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    Standard output is reserved for the result; whatever a model or a library prints goes to standard error.
    """
    if sys.stderr is None:  # closed, as by `2>&-`
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # noqa: PTH123
            return main(arguments)
    options = vars(parser().parse_args(arguments))
    command, as_json = options.pop("command"), options.pop("json")
    own = {"demo": _demo, "explain": _explain, "fit-salf": _fit_salf}
    try:
        _refuse_empty(options)
        with _terminable(), _plain_warnings():
            with contextlib.redirect_stdout(sys.stderr):
                made = own[command](options, as_json) if command in own else run_command(command, options, as_json)
            return _tell(made)
    except (CaptumConceptsError, OSError) as error:  # OSError: a full or read-only disk; existing files are intact
        _say(f"error: {error}", sys.stderr)
        return NOT_DONE
    except Terminated:
        _say("terminated; the files written so far are complete", sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        _say("interrupted; the files written so far are complete", sys.stderr)
        return INTERRUPTED
    except Exception as error:  # Python's exit code 1 has another meaning here
        _say(f"{traceback.format_exc()}error: {type(error).__name__}, a bug in this package or in the model",
             sys.stderr)  # fmt: skip
        return CRASHED


def _refuse_empty(options: dict[str, Any]) -> None:
    """Raise for an empty text, such as of an unset variable of the shell; as a path it would be the current folder."""
    for name, value in options.items():
        if any(isinstance(one, str) and not one.strip() for one in (value if isinstance(value, list) else [value])):
            raise InputError(f"argument {name.replace('_', '-')} is empty; leave it out, or pass a value")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """A context in which SIGTERM raises :class:`Terminated`, once.

    One of several processes is terminated immediately instead, because it may be waiting for the others where Python
    handles no signals. Nothing is lost, as every step is written atomically.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """A context that prints each of this package's warnings as one line, without its source line."""
    before = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
        if issubclass(category, CaptumConceptsWarning):
            return _printable_lines(f"warning: {message}\n")
        return before(message, category, *where, **more)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = before


def _tell(made: Outcome) -> int:
    """Print the result and what is missing from it; return the exit code."""
    if made.text:
        try:
            _say(made.text, sys.stdout)
        except BrokenPipeError:  # the reader has stopped, as after `| head`
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for entry in made.failed:
        _say(f"{made.left_out}: {entry['image']} ({entry['reason']})", sys.stderr)
    if made.unsaved is not None:
        _say(f"error: {made.unsaved}", sys.stderr)
    elif made.code == NOT_DONE:
        _say("error: no image could be explained", sys.stderr)
    return made.exit_code


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _say(text: str, file: Any) -> None:
    """Print text that may contain file names to a terminal or file of any encoding."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(_printable_lines(text).encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def _demo(options: dict, as_json: bool) -> Outcome:
    result: Any
    if (photos := options.pop("photos")) is not None:
        from captum_concepts.demo.photos import explain_photos

        result = explain_photos(photos, options["output"])
    else:
        from captum_concepts.demo.run import run_demo

        result = run_demo(**options)
    text = json.dumps(result.as_dict(), indent=2) if as_json else str(result)
    return Outcome(text, code=int(bool(getattr(result, "skipped", False))))


def _explain(options: dict, as_json: bool) -> Outcome:
    from captum_concepts.commands.explain import ExplainSettings, explain, line_of

    report = explain(ExplainSettings(**options))
    if as_json:
        text = json.dumps(report, indent=2)
    else:
        lines = [line_of(entry) for entry in report["explained"]]
        lines.append(f"{len(report['explained'])} explained at layer {report['layer']}, figures in {options['output']}")
        if options["report"] and report["explained"]:
            lines.append(f"all images on one page: {options['report']}")
        text = "\n".join(lines)
    code = None if report["explained"] else NOT_DONE
    return Outcome(text, report["failed"], "not explained", code, report.get("unsaved"))


def _fit_salf(options: dict, as_json: bool) -> Outcome:
    from captum_concepts.commands.fit_salf import FitSettings, fit_salf

    report = fit_salf(FitSettings(**options))
    code = 1 if report["skipped"] else 0
    if not report["first"]:  # only one of several processes prints
        return Outcome("", code=code)
    text = report.pop("text")
    return Outcome(json.dumps(report, indent=2) if as_json else text, code=code)


def run() -> None:
    """Run :func:`main` and exit with its code."""
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Threads of gloo may still hold tensors and abort during Python's shutdown (pytorch/pytorch#190489), after
        # which torchrun would stop the other processes and report a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
