"""What the command prints: one line for each message, safe for any terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def one_line(text: str) -> str:
    """The same, with every run of white space as one blank."""
    return printable(" ".join(text.split()))


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """In the place of `warnings.formatwarning`: without the place in the code, which says nothing to a user."""
    return f"latentgen: warning: {one_line(str(message))}\n"
