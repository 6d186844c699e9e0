"""Standard streams of commands that run to their end: output, a question, a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Console:
    """Standard input, output and error of the process."""

    @property
    def interactive(self) -> bool:
        """Somebody is there to answer `ask`."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Print what was asked for on standard output.

        Raises:
          BrokenPipeError: nobody reads it any more.
        """
        print(text, flush=True)

    def say(self, text: str) -> None:
        """Print what is said beside it on standard error."""
        print(text, file=sys.stderr, flush=True)

    def ask(self, question: str) -> bool:
        """Put a question on standard error, where it is seen when the output is redirected; True for yes."""
        if not self.interactive:
            return False
        print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Show a bar on standard error while the body runs, where that is a terminal."""
        with tqdm(total=total, desc=what, unit=unit, unit_scale=total > 10_000, disable=None, leave=False) as bar:

            def done(more: int) -> None:
                bar.update(more)

            yield done
