"""The errors that callers may want to catch, all under `AsrError`.

Low-level checks of arguments raise `ValueError` or `TypeError` in the form
``[Owner] rule but got value``. What depends on a user's files, settings or
recordings raises one of the classes below, with a message that names the file
or key and says what to do.
"""

from typing import Any


class AsrError(Exception):
    """Base of every error that this package raises on purpose."""


class AudioError(AsrError):
    """The recording cannot be read, or holds nothing that could be transcribed."""


class ConfigError(AsrError):
    """A configuration has an unknown key, a missing one, or values that do not fit together."""


class CheckpointError(AsrError):
    """A weight file is damaged, unsafe, or does not fit the model it should fill."""


class ModelNotFoundError(AsrError):
    """No model has the given name or path."""


class DownloadError(AsrError):
    """The hub could not be reached, refused what was asked of it, or sent something damaged; or the disk is full."""


class PromptError(AsrError):
    """The prompt profile, language or text cannot be used with this model."""


class BatchError(AudioError):
    """Some of many recordings cannot be read; `results` has what became of each: a transcript, or its own error."""

    def __init__(self, message: str, results: list[Any]) -> None:
        super().__init__(message)
        self.results = results
