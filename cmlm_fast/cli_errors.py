"""Shared by all commands: one-line errors for bad input, quiet libraries, and output from only one of several ranks."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger

import typer

from . import ranks
from .errors import DivergedError, Stopped


@contextmanager
def one_line_errors(kept: str | None = None) -> Iterator[None]:
    """End bad input, a missing package or a full disk with one line and exit code 2; a bug keeps its traceback.

    A signal ends with one line that says what is `kept`.
    """
    try:
        yield
    except (*ranks.EXPECTED, DivergedError) as error:
        # The command line need not name the class or function that rejected an option.
        _say(f"error: {re.sub(r'^[A-Za-z_.]+: (?=expected )', '', ' '.join(str(error).split()))}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stopped:
        signalled = stopped if isinstance(stopped, Stopped) else Stopped(signal.SIGINT)
        _say(str(signalled) if signalled.kept or not kept else f"{signalled}; {kept}")
        raise typer.Exit(128 + signalled.signal) from None


def _say(line: str) -> None:
    if ranks.is_main():
        print(line, file=sys.stderr)


def quiet() -> None:
    """Show only this package's progress bars and warnings, and start no threads that a fork would lose."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    if os.environ["TRANSFORMERS_VERBOSITY"] == "error":  # it is read at import, which may have happened already
        logging.set_verbosity_error()
    logging.disable_progress_bar()  # for loading and saving; training has its own bar
    if not ranks.is_main():
        import datasets

        datasets.disable_progress_bars()
        getLogger("cmlm_fast").setLevel(ERROR)
