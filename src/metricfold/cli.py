"""The command ``metricfold``.

Nothing heavy is imported before the arguments are known to be good: ``--help`` and mistakes are
answered at once, and also where the optional packages are not installed.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from metricfold import __version__
from metricfold.look.commands import COMMANDS

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: the process's own) and return its exit code."""
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    # argparse takes no names behind an option that stands behind others.
    if rest and hasattr(chosen, "names") and not any(one.startswith("-") for one in rest):
        chosen.names += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if chosen.command is None:
        parser.print_help()
        return 2
    if chosen.command == "demo":
        return _demo(chosen)
    return _look(chosen)


def _look(chosen: argparse.Namespace) -> int:
    from metricfold.look import LookError  # noqa: PLC0415 - see above

    try:
        code: int = chosen.run_command(chosen)
    except LookError as error:
        return _say(str(error), 2, chosen.command)
    except BrokenPipeError:
        # Whoever read it, such as head, has enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    return code


def _demo(chosen: argparse.Namespace) -> int:
    from metricfold.demo.folder import RunFolder  # noqa: PLC0415 - see above
    from metricfold.demo.framework import FRAMEWORKS  # noqa: PLC0415
    from metricfold.demo.run import run_demo  # noqa: PLC0415
    from metricfold.demo.texts import DemoError  # noqa: PLC0415

    other, instead = ("ranks", "devices") if chosen.framework == "jax" else ("devices", "ranks")
    if getattr(chosen, other) is not None:
        return _say(
            f"--{other} does not go with --framework {chosen.framework}: give --{instead}", 2
        )
    names = [name for name, _ in chosen.data]
    if twice := [name for name in names if names.count(name) > 1]:
        return _say(
            f"--data names {twice[0]!r} twice: give each dataset its own name (see metricfold demo "
            "--help)",
            2,
        )
    try:
        run_demo(
            framework=FRAMEWORKS[chosen.framework],
            parts=chosen.devices if chosen.framework == "jax" else chosen.ranks,
            steps=chosen.steps,
            data=dict(chosen.data),
            out=chosen.out,
            resume=chosen.resume,
            settings={
                name: one
                for name, one in (("seed", chosen.seed), ("learning_rate", chosen.lr))
                if one is not None
            },
        )
    except DemoError as error:
        return _say(str(error), 1)
    except KeyboardInterrupt:
        saved = RunFolder(chosen.out).checkpoint.exists()
        hint = "; --resume goes on from the last checkpoint" if saved else ""
        return _say(f"stopped, with all its processes{hint}", 130)
    return 0


def _say(message: str, exit_code: int, command: str = "demo") -> int:
    from metricfold.metric import escaped  # noqa: PLC0415 - see above

    # Paths and what files hold may be anything, and this goes to a terminal.
    message = "\n".join(map(escaped, message.split("\n")))
    print(f"metricfold {command}: {message}", file=sys.stderr)  # noqa: T201 - what a command does
    return exit_code


class _Parser(argparse.ArgumentParser):
    """Answers a mistake with one sentence, and not with the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="metricfold",
        description=(
            "Look at runs whose metrics were folded over samples, datasets, devices and ranks: while "
            "they train, and after."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"metricfold {__version__}")
    commands = parser.add_subparsers(dest="command", parser_class=_Parser, metavar="command")
    for command in COMMANDS:
        of_command = commands.add_parser(
            command.name, help=command.help, description=command.description, allow_abbrev=False
        )
        command.add_arguments(of_command)
        of_command.set_defaults(run_command=command.run)
    demo = commands.add_parser(
        "demo",
        help="train a small language model on several ranks or devices and watch its metrics",
        description=(
            "Train a small byte-level language model on several ranks of PyTorch, or on several "
            "devices of JAX, on this machine's CPU, and watch its metrics per dataset in the "
            "terminal, in TensorBoard files and in a JSONL file. At the end the logged numbers are "
            "counted again from the data, and the run goes on for a few steps on another number of "
            "ranks or devices."
        ),
        allow_abbrev=False,
    )
    demo.add_argument(
        "--framework",
        choices=("torch", "jax"),
        default="torch",
        help="what to train with (default: torch)",
    )
    demo.add_argument(
        "--ranks", type=_positive, metavar="N", help="torch: processes that train (default: 2)"
    )
    demo.add_argument(
        "--devices",
        type=_positive,
        metavar="N",
        help="jax: virtual devices of one process that train (default: 4)",
    )
    demo.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="steps to train (default: 200; jax: 60, after a longer start)",
    )
    demo.add_argument(
        "--seed", type=_count, metavar="N", help="of the model's first weights (default: 0)"
    )
    demo.add_argument("--lr", type=_rate, metavar="X", help="the learning rate (default: 0.008)")
    demo.add_argument(
        "--data",
        type=_dataset,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=(
            "train on this dataset instead of Python's documentation and library: a .txt file, a "
            ".jsonl file with a field 'text', or a folder of such files; may be given repeatedly"
        ),
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="folder of the run (default: runs/demo); an earlier demo in it is replaced",
    )
    demo.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --out"
    )
    return parser


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return rate


def _dataset(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=PATH")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise argparse.ArgumentTypeError(
            f"{name!r} cannot name a dataset: use letters, digits, '_', '-' and '.'"
        )
    return name, Path(path)


if __name__ == "__main__":
    sys.exit(main())
