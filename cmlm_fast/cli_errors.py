"""What every command shares: bad input ends with one line, and the libraries' chatter is off; of several ranks one speaks."""

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
    """A bad input, a missing package or a full disk ends with one line and exit code 2, a signal with one that says what is
    `kept`; a bug keeps its traceback."""
    try:
        yield
    except (*ranks.EXPECTED, DivergedError) as error:
        # What in the package refused an option is nothing to the command line.
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
    """Progress bars and warnings of ours only, and no threads that a fork would lose."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    if os.environ["TRANSFORMERS_VERBOSITY"] == "error":  # it is read at the import, which may have been before
        logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and saving; the training's bar is another
    if not ranks.is_main():
        import datasets

        datasets.disable_progress_bars()
        getLogger("cmlm_fast").setLevel(ERROR)
