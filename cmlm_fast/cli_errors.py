"""What every command shares: bad input ends with one line, and the libraries' chatter is off."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line_errors(stopped: str = "continue with --resume where a checkpoint was written") -> Iterator[None]:
    """A bad input, a missing package or a full disk ends with one line and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr)
        raise typer.Exit(130) from None


def quiet() -> None:
    """Progress bars and warnings of ours only, and no threads that a fork would lose."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving; the training's bar is another
