"""What can be wrong with a model's files: one exception, whose message names the thing, the number and the
remedy."""


class ModelError(ValueError):
    """A configuration or checkpoint that cannot be used as it is; the message is one line, fit for a user."""
