"""One process of a launch fails in the middle of a training: ``failing_run.py HOW RANK ARGUMENTS...``.

ARGUMENTS are those of the command; `HOW` is what befalls process RANK in the first micro-batch after `STEPS` steps.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from typing import Any

import torch

from hubkit.cli import main
from hubkit.errors import HubkitError
from hubkit.tensors.live.attached import Attached
from hubkit.training import stepper

STEPS = 2


def fail(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory":
        raise HubkitError("HK-MEMORY", "there is not enough memory")
    raise ValueError("a plugin's fault")


if __name__ == "__main__":
    torch.set_num_threads(1)
    how, rank, *arguments = sys.argv[1:]
    done = [0]
    step, forward = stepper.Stepper.step, Attached.forward

    def counted(own: Any, *given: Any) -> Any:
        found = step(own, *given)
        done[0] += 1
        return found

    @functools.wraps(forward)
    def failing(own: Any, *given: Any, **named: Any) -> Any:
        if done[0] == STEPS and torch.is_grad_enabled() and os.environ["RANK"] == rank:
            fail(how)
        return forward(own, *given, **named)

    stepper.Stepper.step, Attached.forward = counted, failing  # type: ignore[method-assign, assignment]
    sys.argv = ["hubkit", *arguments]
    main()
