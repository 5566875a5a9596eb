"""The ``hubkit`` command: flags in, one verb called, the result printed. One file per command.

The code is in `boundary`, not here: importing ``hubkit.cli.list`` puts the name ``list`` into this namespace.
"""

from __future__ import annotations

from hubkit.cli.boundary import hubkit, main, run

__all__ = ["hubkit", "main", "run"]
