"""The runtime's errors. A message is one line with the thing, the number and the remedy."""


class MixtralError(Exception):
    """The base of all of them. A user can do something about each."""


class OptionError(MixtralError, ValueError):
    """An option has a value that makes no sense on any machine, or for this model."""


class DeviceError(MixtralError):
    """This machine cannot do what the options ask for: it lacks the device, or the memory."""


class LoadError(MixtralError):
    """A checkpoint or tokenizer cannot be used."""


class RequestError(MixtralError):
    """A request cannot be served. The engine is unchanged, and the next request works."""


class PromptTooLong(RequestError):
    """The prompt leaves no room in the context for even one new token."""
