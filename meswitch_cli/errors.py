"""The errors meswitch raises: every mistake a user can make ends in one of these, never in a traceback."""


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, or the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def plain_reason(message: str) -> str:
    """What pydantic says of a value, without the name of its own exception before it."""
    return message.removeprefix("Value error, ")


def causes(error: BaseException) -> list[BaseException]:
    """An exception, what it was raised from, and so on."""
    links = [error]
    while (cause := links[-1].__cause__) is not None:
        links.append(cause)
    return links


class MeswitchError(Exception):
    """The work cannot go on; the message says what is wrong, where, and what to do next. Exit status 1."""

    exit_code = 1


class UsageError(MeswitchError):
    """The command was called wrongly: an option's value, or two options that exclude each other. Exit status 2."""

    exit_code = 2


class Interrupted(MeswitchError):
    """The user stopped the work. Exit status 130, as a shell gives it."""

    exit_code = 130


class CheckpointError(MeswitchError):
    """A Hugging Face checkpoint is missing, damaged, or of a kind meswitch cannot compress."""


class ArtifactError(MeswitchError):
    """An artifact is missing, damaged, of an unknown version, or does not belong to the given base."""


class CalibrationError(MeswitchError):
    """The calibration data cannot be read or used."""


class RouterError(MeswitchError):
    """Routing data cannot be used, or a router is missing, damaged, or made for other experts or another base."""


class EvaluationError(MeswitchError):
    """An evaluation cannot be made: data, tasks or models that do not go together, or logits that are not finite."""
