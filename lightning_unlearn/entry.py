"""The installed command, which tells what to install when its extras are missing."""

from __future__ import annotations

import sys

__all__ = ["run"]


def run() -> None:
    """Run ``lightning-unlearn`` and leave with an exit code: 0 for success, 1 for an error that the user can mend."""
    try:
        from lightning_unlearn.cli import main
    except ModuleNotFoundError as error:
        sys.exit(f"lightning-unlearn: {error}. The command line needs an extra: pip install 'lightning-unlearn[demo]'")
    try:
        main()
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"lightning-unlearn: {error}")
