"""One name for a plan that a class makes, and for the plan that an instance has."""

from collections.abc import Callable
from inspect import unwrap
from typing import Generic, ParamSpec, overload

from runtime.planning.plan import Plan

P = ParamSpec("P")


class planned(Generic[P]):
    """Decorates a static method of a class whose instances have a plan under the same name.

    On the class the name is the method. Instances assign their plan as any attribute, and that is what they
    see, because a descriptor without `__set__` gives way to it.
    """

    def __init__(self, method: Callable[P, Plan]) -> None:
        self.method: Callable[P, Plan] = unwrap(method)  # the function itself, which `help` shows
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[P, Plan]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Plan: ...

    def __get__(self, instance: object | None, owner: type) -> Callable[P, Plan] | Plan:
        if instance is not None:
            raise AttributeError("plan: the engine has none yet")
        return self.method
