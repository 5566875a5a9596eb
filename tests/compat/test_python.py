"""Python's own library still is what `hubkit.compat.python` takes it for."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from hubkit.compat.python import parsed_expression

WORDS = {
    r"abc": ["LITERAL"] * 3,
    r"a*": ["MAX_REPEAT"],
    r"a+?": ["MIN_REPEAT"],
    r"a*+": ["POSSESSIVE_REPEAT"],
    r"(a)": ["SUBPATTERN"],
    r"(?:ab|cd)": ["BRANCH"],
    r"ab|cd": ["BRANCH"],
    r"(a)\1": ["SUBPATTERN", "GROUPREF"],
    r"[a-z]": ["IN"],
    r".": ["ANY"],
    r"(?=a)": ["ASSERT"],
    r"(?>a)": ["ATOMIC_GROUP"],
}


@pytest.mark.parametrize("text", WORDS)
def test_an_expression_is_taken_apart_into_operators_of_these_names(text: str) -> None:
    assert [str(operator) for operator, _ in parsed_expression(text)] == WORDS[text]


def test_arguments_hold_what_is_inside() -> None:
    ((_, (low, high, body)),) = parsed_expression("(ab|cd){2,5}")
    assert (int(low), int(high)) == (2, 5)
    ((_, group),) = body
    assert [hasattr(part, "getwidth") for part in group] == [False, False, False, True]
    ((_, (_, branches)),) = parsed_expression("ab|cd*")
    assert [[str(operator) for operator, _ in branch] for branch in branches] == [
        ["LITERAL", "LITERAL"],
        ["LITERAL", "MAX_REPEAT"],
    ]
    with pytest.raises(re.error):
        parsed_expression("(")


ENDS = """
import atexit, sys, threading, time
from hubkit.compat.python import leave
class Last:
    def __del__(self): print("taken apart")
last = Last()
atexit.register(lambda: print("registered"))
if len(sys.argv) > 1: threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
sys.stdout.write("held ")
leave(3, (sys.stdout, sys.stderr))
"""


@pytest.mark.parametrize(
    ("more", "said"), [([], "held registered\n"), (["x"], "held thread\nregistered\ntaken apart\n")]
)
def test_a_process_ends_with_all_but_taking_modules_apart(more: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS, *more], text=True, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (3, said)
