"""The installed command, which tells what to install when its extras are missing."""

from __future__ import annotations

import os
import re
import sys

__all__ = ["run"]

# What jsonargparse says of each type that a value might have been of, around what really went wrong.
_AROUND = re.compile(
    r"(- )?(Does not validate against any of the Union|Expected a (<class|typing)|Import path \S+ does not correspond)"
    r"|Subtypes: \[|Errors:$|Given value( type)?: "
)
_OF_EXTRAS = {"jsonargparse", "matplotlib", "rich", "sklearn", "tensorboard", "yaml"}


def run() -> None:
    """Run ``lightning-unlearn`` and leave with an exit code: 0 for success, 1 for an error, 3 for a bad verdict."""
    # Classes of the user's own, named in YAML, lie in the current folder; `python -m` looks there, too.
    sys.path.insert(0, os.getcwd())
    try:
        # Not all that is missing is missed on import: Lightning asks for jsonargparse when its CLI is used.
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from lightning_unlearn.cli import main

        try:
            result = main()
        except (ValueError, TypeError, OSError, MemoryError, MisconfigurationException) as error:
            if sys.argv[1:2] == ["fit"]:
                raise  # it may come from the user's own training code, where only a traceback tells the place
            sys.exit(f"lightning-unlearn: {_reason(str(error))}")
        if sys.argv[1:2] == ["audit"] and getattr(result, "verdict", None) != "clean":
            sys.exit(3)
    except ImportError as error:
        missing, reason = (error.name or "").partition(".")[0], _reason(str(error)).removesuffix(".")
        # Lightning's own messages have no name beside them.
        if missing in _OF_EXTRAS or (not missing and any(extra in reason for extra in _OF_EXTRAS)):
            reason += ". The command line needs an extra: pip install 'lightning-unlearn[demo]'"
        elif sys.argv[1:2] == ["fit"] and "lightning-unlearn[" not in reason:
            raise  # by code of the user's own
        sys.exit(f"lightning-unlearn: {reason}")


def _reason(message: str) -> str:
    """An error in one line, without what jsonargparse puts around it; torch's messages, too, have many lines."""
    lines = [line.strip() for line in message.splitlines()]
    if lines and lines[0].startswith("Does not validate against any"):
        told = [line.removeprefix("- ") for line in lines if not _AROUND.match(line)]
        lines = list(dict.fromkeys(told)) or lines
    return " ".join(" ".join(lines).split())
