"""Every exception of ours, and how to put an error into one line."""

AGAIN = "save, copy or download it again"


class ArtifactError(ValueError):
    """A file or folder that cannot be trusted or understood as an artifact; one line says why and what to do."""


def short(value: object) -> str:
    """A value from a stranger's file as at most 80 plain characters on one line."""
    plain = isinstance(value, str | float | None | Exception) or (isinstance(value, int) and abs(value) < 10**9)
    return ascii(str(value))[1:-1][:80] if plain else type(value).__name__


def one_line(error: BaseException) -> str:
    """What an exception of another library says, as one line."""
    return " ".join(str(error).split()) or type(error).__name__


class HubError(OSError):
    """The Hub, or the way to it, refused; the message says why and what to do. Nothing was left half done."""


class TrainingDiverged(RuntimeError):
    """A loss became NaN or Q exploded; the agent holds its last good state and can be used or saved."""
