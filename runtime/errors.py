"""Everything that the runtime raises on purpose. A message is one line: the thing, the number, the remedy."""


class MixtralError(Exception):
    """Base of the family: `except MixtralError` catches what a user can do something about."""


class OptionError(MixtralError, ValueError):
    """An option whose value makes no sense anywhere."""


class DeviceError(MixtralError):
    """An option that this machine cannot honour: no such device, or too little memory."""


class LoadError(MixtralError):
    """A checkpoint or tokenizer that cannot be used."""


class RequestError(MixtralError):
    """A request that cannot be served. The engine is as it was, and the next request works."""


class PromptTooLong(RequestError):
    """The prompt leaves no room in the context for even one new token."""
