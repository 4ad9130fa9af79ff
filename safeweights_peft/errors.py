"""The only exception tree of the package; it imports nothing."""

# Every message names the file, tensor or option, what was expected and found, and what to do:
# `<key>: expected <x>, found <y>; <next step>`. The command line turns each of these into one line
# and an exit code; anything else that escapes is a defect.


class SafeWeightsError(Exception):
    """Base of every error that this package raises on purpose."""


class FormatError(SafeWeightsError):
    """An adapter directory is not a readable safety patch or safety map."""


class CorruptAdapterError(FormatError):
    """An adapter's content breaks a rule of the format (bounds, order, counts, digests, ...)."""


class UnsupportedVersionError(FormatError):
    """An adapter was written in a format version or encoding that this package cannot read."""


class BaseMismatchError(SafeWeightsError):
    """A base model is not the one that an adapter was made for."""


class AlreadyMergedError(BaseMismatchError):
    """A base model already holds the adapter's merged values."""


class CheckpointError(SafeWeightsError):
    """A checkpoint directory cannot be read or written."""


class ModelError(SafeWeightsError):
    """A model cannot be loaded, or its parameters cannot be matched with its checkpoint."""


class DataError(SafeWeightsError):
    """Prompts or training examples are missing, malformed or too few."""


class SettingsError(SafeWeightsError):
    """A setting is of another type, out of range, or unknown."""


class SelectionError(SafeWeightsError):
    """Scores or a requested density do not allow a selection."""


class TrainingError(SafeWeightsError):
    """Training cannot start, cannot resume, or has diverged."""


class EvaluationError(SafeWeightsError):
    """Answers cannot be generated or judged."""


class MergeError(SafeWeightsError, ValueError):
    """Patches cannot be merged into this base, or not in this way."""


class SignatureError(SafeWeightsError):
    """A signature cannot be made, is missing, or is not by this key for these files."""


class HubError(SafeWeightsError):
    """A patch or a map cannot be pushed to the Hub, or found or fetched there."""


class ReportError(SafeWeightsError):
    """A report cannot be written, or there is nothing to compare."""


class SafeWeightsWarning(UserWarning):
    """A request is ignored, or carried out in another way."""


class UnsupportedFeatureError(SafeWeightsError):
    """A feature that PEFT offers is refused, as its result would be wrong."""
