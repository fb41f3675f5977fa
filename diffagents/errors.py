"""Every exception that the library defines, and helpers that put foreign errors and values into one line."""

AGAIN = "save, copy or download it again"
"""The cure for a damaged file, as the end of an error message."""


class ArtifactError(ValueError):
    """A file or folder cannot be trusted or understood as an artifact; the message says why and what to do, in one line."""


class HubError(OSError):
    """The Hub refused a request or could not be reached; the message says why and what to do. Nothing was left half done."""


class TrainingDiverged(RuntimeError):
    """A loss became NaN or Q exploded; the agent holds its last good state and can be used or saved."""


def short(value: object) -> str:
    """A value from an untrusted file as at most 80 printable ASCII characters; containers are named by their type."""
    plain = isinstance(value, str | float | None | Exception) or (isinstance(value, int) and abs(value) < 10**9)
    return ascii(str(value))[1:-1][:80] if plain else type(value).__name__


def one_line(error: BaseException) -> str:
    """The message of an exception with line breaks and repeated spaces removed; its class name if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: object) -> str:
    """A text that may contain parts of untrusted files, with control characters (but line breaks and tabs) as `?`."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in str(text))


def encodable(text: str) -> str:
    """A text with `?` for what no file can hold: halves of surrogate pairs, as odd file names and JSON give them."""
    return text.encode("utf-8", "replace").decode()
