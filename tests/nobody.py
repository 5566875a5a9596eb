"""A call by a user without rights, in a process of its own: files refuse it that never refuse root."""

from __future__ import annotations

import os
from collections.abc import Callable

from hubkit.errors import HubkitError

NOBODY = 65534


def as_nobody(call: Callable[[], object], user: int = NOBODY) -> str:
    """The code of the refusal that `call` ends in, "" when it ends well, or another exception's own words."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            if os.geteuid() == 0:
                os.setuid(user)
            call()
        except HubkitError as error:
            said = error.code
        except BaseException as error:
            said = repr(error)
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        said = told.read()
    os.waitpid(child, 0)
    return said
