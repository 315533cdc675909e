"""The base of the errors that tell their reader what to do, rather than of a defect here."""


class QuantError(RuntimeError):
    """A request that the model, the data or a file as they are cannot fulfil; says the remedy."""
