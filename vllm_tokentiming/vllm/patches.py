"""The functions of vLLM that we wrap or replace: each one once, by name, with what happens if our part of it fails.

A patch has two parts of ours. ``ours`` is called in the place of vLLM's function, which it gets as its first argument.
``instead`` is called if ``ours`` raises. What vLLM's own function raises passes through. So nothing of ours can end a
request, unless ``instead`` says so.

``installed`` lists all patches; the tests make each of them fail.
"""

from __future__ import annotations

import functools
import inspect
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_tokentiming.config import SettingsError

logger = logging.getLogger(f"vllm.{__name__}")

Function = Callable[..., Any]


def leave_alone(original: Function, _fault: Exception, *args: Any, **kwargs: Any) -> Any:
    """Do what vLLM does without us: the usual ``instead``."""
    return original(*args, **kwargs)


@dataclass
class Patch:
    """One function of vLLM's that is ours now.

    Attributes:
        name: Of the function, with its class or module.
        since: The versions of vLLM that were seen to need the patch.
        until: What must change in vLLM before the patch can go.
        original: What was there before.
        ours: Called as ``ours(original, *args, **kwargs)``.
        instead: Called as ``instead(original, fault, *args, **kwargs)`` if ``ours`` raises before it has called
            ``original``. If ``ours`` raises after that, the result of ``original`` stands.
        replacement: What is there now.
    """

    name: str
    since: str
    until: str
    original: Function
    ours: Function
    instead: Function
    replacement: Function = field(init=False)
    _logged: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Make what takes the place of vLLM's function."""

        @functools.wraps(self.original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        self.replacement = replacement

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        theirs: list[BaseException] = []

        def original(*args: Any, **kwargs: Any) -> Any:
            try:
                results.append(self.original(*args, **kwargs))
            except BaseException as error:
                theirs.append(error)
                raise
            return results[-1]

        try:
            return self.ours(original, *args, **kwargs)
        except SettingsError:
            raise  # It is for the user, who has to change something.
        except Exception as fault:
            if any(fault is error for error in theirs):
                raise
            self._log(fault)
            if results:
                return results[-1]
            return self.instead(self.original, fault, *args, **kwargs)

    def _log(self, fault: Exception) -> None:
        where = traceback.extract_tb(fault.__traceback__)[-1]
        kind = f"{type(fault).__name__} in {where.filename}, line {where.lineno}"
        if kind not in self._logged:
            self._logged.add(kind)
            logger.exception("TokenTiming's part of vLLM's %s failed.", self.name)

    def stands(self, found: Any) -> bool:
        """Return whether a function is our replacement, or wraps it as ``functools.wraps`` does."""
        while found is not None:
            if found is self.replacement:
                return True
            found = getattr(found, "__wrapped__", None)
        return False


_installed: dict[tuple[Any, str], Patch] = {}


def install(
    owner: Any, attribute: str, ours: Function, *, since: str, until: str, instead: Function = leave_alone
) -> None:
    """Patch a function of vLLM's. Does nothing if that has been done.

    Args:
        owner: The class or module that has it.
        attribute: Its name there.
        ours: See ``Patch``; so the others.
        since: Versions.
        until: What must change.
        instead: Called after a fault.

    Raises:
        AttributeError: There is no such function.
    """
    if (owner, attribute) in _installed:
        return
    found = inspect.getattr_static(owner, attribute)
    of_class = isinstance(found, classmethod)
    name = f"{owner.__name__.removeprefix('vllm.')}.{attribute}"
    patch = Patch(name, since, until, found.__func__ if of_class else found, ours, instead)
    setattr(owner, attribute, classmethod(patch.replacement) if of_class else patch.replacement)
    _installed[owner, attribute] = patch


def installed() -> list[Patch]:
    """All patches of this process."""
    return list(_installed.values())


def check() -> None:
    """Refuse to work where another plugin has taken our patches away.

    Raises:
        SettingsError: One has.
    """
    for (owner, attribute), patch in _installed.items():
        found = inspect.getattr_static(owner, attribute)
        found = found.__func__ if isinstance(found, classmethod) else found
        if not patch.stands(found):
            raise SettingsError(
                f"tokentiming needs vLLM's {patch.name}, which {getattr(found, '__module__', 'another plugin')} has "
                "replaced; leave that plugin out of VLLM_PLUGINS, or have it use functools.wraps on what it replaces."
            )
