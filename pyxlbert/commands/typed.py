"""Errors with a command's options called as they are typed: Python's `batch_size` is `--batch-size` there."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pyxlbert.files import said

# What a message begins with where it is about an argument.
_SUBJECT = re.compile(r"([a-z][a-z0-9_]*): ")
# Other arguments that it names: words with an underscore, outside of what is quoted.
_WORDS = re.compile(r"'[^']*'|\"[^\"]*\"|(?<![\w./-])[a-z0-9]+(?:_[a-z0-9]+)+(?![\w./-])")
_SWAPPED = {"True": "False", "False": "True"}


class _Typed(NamedTuple):
    """How an argument is typed; inverted: the option that is given stands for False."""

    text: str
    inverted: bool = False


def speaker(
    parser: argparse.ArgumentParser, options: argparse.Namespace, arguments: Sequence[str]
) -> Callable[[BaseException], str]:
    """What says an error of a command in its user's words.

    Args:
        parser: of the program.
        options: what it has parsed. `arguments` among them, by `set_defaults`, holds names of Python's that are no
            option's, and how what they stand for is typed; with "not " before it where it stands for the contrary.
        arguments: what it was given.
    """
    names = _names(_leaf(parser, options), arguments)
    for name, text in getattr(options, "arguments", {}).items():
        contrary, typed = text.startswith("not "), text.removeprefix("not ")
        option = names.get(typed.removeprefix("--").replace("-", "_"), _Typed(typed))
        names[name] = _Typed(option.text, option.inverted != contrary)
    given = set(_words(vars(options).values()))
    return lambda error: _said(said(error), names, given)


def _said(message: str, names: dict[str, _Typed], given: set[str]) -> str:
    found = _SUBJECT.match(message)
    if found is None or found[1] not in names:
        return message
    if found[1] in given and os.path.isfile(found[1]):  # a file that is called like an option
        return message
    typed, rest = names[found[1]], message[found.end() :]
    if typed.inverted:
        rest = re.sub(r"\b(True|False)\b", lambda word: _SWAPPED[word[0]], rest)
    rest = _WORDS.sub(lambda word: names[word[0]].text if word[0] in names else word[0], rest)
    return f"{typed.text}: {rest}"


def _leaf(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.ArgumentParser:
    """The parser of the command, or of the task in it, that was given."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return _leaf(action.choices[getattr(options, action.dest)], options)
    return parser


def _names(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, _Typed]:
    names = {}
    for action in parser._actions:
        long = [one for one in action.option_strings if one.startswith("--")]
        if not action.option_strings:
            names[action.dest] = _Typed(str(action.metavar or action.dest))
        elif long:
            text = next((one for one in long if any(_is(word, one) for word in arguments)), long[0])
            inverted = action.const is False or (isinstance(action, argparse.BooleanOptionalAction) and "--no-" in text)
            names[action.dest] = _Typed(text, inverted)
    return names


def _is(word: str, option: str) -> bool:
    return word.partition("=")[0] == option


def _words(values: Any) -> Iterator[str]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _words(value)
        elif value is not None:
            yield str(value)
