"""The one error for bad input: a single line that says what is wrong, where, and what would be right."""

from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from a user: a name, a value, a file. The command line prints it as one line and exits with 2."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """The error for an unknown `name` of a `kind` ("optimizer", "corpus", "key"): suggests the nearest of `choices`."""
    from difflib import get_close_matches  # only on the way to an error: `import muonlab` stays as light as torch

    options = sorted(choices)
    near = get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(options)}"
    return InputError(f"unknown {kind} {name!r}; {hint}")
