"""The argument parser of the commands: its errors have a short usage of the command in question, and a suggestion."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what was meant by a misspelt command, option or choice."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.set_defaults(parser=self)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the arguments, with the parser of the command that was called as `parser`; exit with 2 for others."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            getattr(found, "parser", self).refuse(unknown)
        return found

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit with 2 for words that no option or argument takes."""
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if not options:
            self.error(f"nothing takes {' '.join(unknown)!r:.200}; quote a text of several words")
        known = [option for action in self._actions for option in action.option_strings]
        self.error("; ".join(f"there is no option {option}{meant(option, known)}" for option in options))

    def error(self, message: str) -> NoReturn:
        """Print the usage without options, and the message; exit with 2."""
        needed = [action for action in self._actions if action.required or not action.option_strings]
        usage = self._get_formatter()
        usage.add_usage(None, needed, ())
        more = "" if len(needed) == len(self._actions) else " [options]"
        help = f"{self.prog} --help lists all"
        print(f"{usage.format_help().rstrip()}{more}\n{self.prog}: {message}; {help}", file=sys.stderr)
        self.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"{str(value)!r:.200} is none of {', '.join(choices)}{meant(str(value), choices)}"
            )


def meant(word: str, known: Iterable[str]) -> str:
    """Return ": did you mean X?" for what `word` is most like, "" where it is like nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
