"""The installed command, which tells what to install when its extras are missing."""

from __future__ import annotations

import os
import sys

__all__ = ["run"]

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
            sys.exit(f"lightning-unlearn: {' '.join(str(error).split())}")  # torch's messages have many lines
        if sys.argv[1:2] == ["audit"] and getattr(result, "verdict", None) != "clean":
            sys.exit(3)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing and missing not in _OF_EXTRAS:  # by code of the user's own
            if sys.argv[1:2] == ["fit"]:
                raise
            sys.exit(f"lightning-unlearn: {error}.")
        sys.exit(f"lightning-unlearn: {error}. The command line needs an extra: pip install 'lightning-unlearn[demo]'")
