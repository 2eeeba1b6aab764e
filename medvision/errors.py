"""The one error that a user can mend."""


class MedvisionError(ValueError):
    """Names what was found, what was expected and the cure; shown without a traceback."""
