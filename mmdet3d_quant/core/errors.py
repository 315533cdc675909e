"""Base class of errors that the user can remedy, unlike defects of this package."""


class QuantError(RuntimeError):
    """A request that the given model, data or file cannot fulfil; the message has the remedy."""
