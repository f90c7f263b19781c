"""The error that ends a request when another rank can no longer do its part."""

from runtime.errors import RequestError


class Lost(RequestError):
    """Another rank has ended, has failed, or cannot be reached. One line says which, and why if known.

    Nothing more can be computed with these ranks: close the engine, and start all of them again.
    """
