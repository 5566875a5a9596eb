"""The one error boundary: whatever goes wrong below is printed here, once, and becomes the exit status.

0 done, 1 refused or failed, 2 wrong usage, 3 undecided, 130 Ctrl-C, 143 SIGTERM. Imports click and `hubkit.errors`
only, so that ``hubkit --help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from hubkit import __version__
from hubkit.cli.group import LazyGroup
from hubkit.cli.output import give_up_stdout, note, write_error
from hubkit.errors import USAGE, HubkitError, Notice, is_told, nearest

INTERRUPTED = 130
TERMINATED = 143
PIPE_CLOSED = 141
_UNWRITABLE = (errno.ENOSPC, errno.EBADF, errno.EIO, errno.EFBIG, errno.EDQUOT)
"""Errors without a file's name that reach the boundary: whatever writes files has named them."""
_NO_MEMORY = re.compile(r"allocate memory|out of memory", re.IGNORECASE)
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=Bearer )\S+")


@click.group(
    "hubkit",
    cls=LazyGroup,
    invoke_without_command=True,
    subcommand_metavar="COMMAND ...",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command has --help with an example, and --json for one JSON document on stdout.",
)
@click.version_option(__version__, prog_name="hubkit", message="%(prog)s %(version)s")
@click.pass_context
def hubkit(ctx: click.Context) -> None:
    """A package manager for model adapters: make them, prove which base they belong to, share, combine and run them."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """Run the command line of this process and exit with its status."""
    _hold_streams()
    status = run(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is half written now: no traceback from here on
    if "torch" in sys.modules:
        from hubkit.compat.python import leave

        leave(status, (sys.stdout, sys.stderr))
    sys.exit(status)


def _hold_streams() -> None:
    """Where the caller closed stdin, stdout or stderr, the next file that is opened would get its number, and what is
    printed: /dev/full takes the place of a closed output, so that writing to it is an error that is told."""
    for number, path in enumerate((os.devnull, "/dev/full", os.devnull)):
        try:
            os.fstat(number)
        except OSError:
            os.open(path if os.path.exists(path) else os.devnull, os.O_RDWR)  # the lowest free number
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def run(arguments: Sequence[str]) -> int:
    """Run one command line; print its result or its one error; return the exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("_HUBKIT_COMPLETE"):
        from hubkit.cli.completing import complete

        return complete(hubkit, os.environ.get("COMP_WORDS", ""))
    as_json, silent = "--json" in arguments, _follows(arguments)
    try:
        with _notices(silent), hubkit.make_context("hubkit", list(arguments)) as context:
            hubkit.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, click.Abort) as stopped:
        if is_told(stopped):
            return INTERRUPTED
        return write_error(HubkitError("HK-INTERRUPTED", "stopped by Ctrl-C", status=INTERRUPTED), as_json)
    except BrokenPipeError as error:
        return PIPE_CLOSED if _reader_left() else write_error(_refusal(error), as_json)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _UNWRITABLE:
            give_up_stdout()
            error = HubkitError("HK-IO", "standard output cannot be written to", have=error.strerror or str(error))
        refusal = _refusal(error)
        if is_told(error) or (silent and refusal.status == USAGE):
            return refusal.status
        return write_error(refusal, as_json)
    return 0


def _follows(arguments: Sequence[str]) -> bool:
    """Whether another process of a launch runs the same training and speaks for this one."""
    if list(arguments[:1]) != ["train"]:
        return False
    from hubkit.training.ranks.launched import speaks

    return not speaks()


@contextmanager
def _notices(silent: bool) -> Iterator[None]:
    """What the layers below want said on the way is one line on stderr, once; other warnings are as they were."""
    before, said = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if not issubclass(category, Notice):
            before(message, category, *rest)
        elif str(message) not in said and not silent:
            said.add(str(message))
            note(f"note: {message}")

    warnings.showwarning = show  # type: ignore[assignment]
    warnings.simplefilter("always", Notice)
    try:
        yield
    finally:
        warnings.showwarning = before


def _refusal(error: Exception) -> HubkitError:
    """Any exception in the one form that users see."""
    if isinstance(error, HubkitError):
        return error
    if isinstance(error, click.UsageError):
        return _usage(error)
    if isinstance(error, click.ClickException):
        return HubkitError("HK-IO", error.format_message())
    if isinstance(error, ConnectionError | TimeoutError):
        return HubkitError("HK-OFFLINE", "a connection broke", have=str(error), fix="try again")
    if isinstance(error, OSError) and error.errno is not None:
        # Refused by the operating system: a full disk, a folder without permission. Not a bug, and not a traceback.
        from hubkit.documents.files import refusal

        return refusal(error, "")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        fix = "smaller batches or ranks, shorter rows, --checkpointing, or a machine with more memory"
        return HubkitError("HK-MEMORY", "there is not enough memory", have=str(error)[:200], fix=fix)
    return _internal(error)


def _usage(error: click.UsageError) -> HubkitError:
    path = error.ctx.command_path if error.ctx else "hubkit"
    near = [f"{path} {name}" for name in getattr(error, "possibilities", None) or ()]
    if isinstance(error, click.NoSuchOption) and re.fullmatch(r"-\d+", error.option_name):
        what = f"{error.option_name} is no number that this takes"  # --dry-run=-1: click reads it as an option
        fix = f"a number from 0 on    or    {path} --help"
        return HubkitError(
            "HK-USAGE", what, where=path, want="0, 1, 2, ...", have=error.option_name, fix=fix, status=USAGE
        )
    if isinstance(error, click.NoSuchOption):
        near = _options_like(error, path)
    what = re.sub(r"\s*\(?Did you mean.*$", "", error.format_message(), flags=re.DOTALL).rstrip(".?")
    fix = "    or    ".join([*near, f"{path} --help"])
    return HubkitError("HK-USAGE", what[:1].lower() + what[1:], where=path, fix=fix, status=USAGE)


def _options_like(error: click.NoSuchOption, path: str) -> list[str]:
    """Options that were meant, perhaps: those that are much like it, or one of the method's, where there is --set."""
    given = error.option_name.lstrip("-")
    known = [
        name[2:] for one in (error.ctx.command.params if error.ctx else ()) for name in one.opts if name[:2] == "--"
    ]
    like = nearest(given, known, 2, 0.7)
    method = [f"{path} --set {given.replace('-', '_')}=VALUE"] if "set" in known else []
    return [f"{path} --{name}" for name in like] or method


def _internal(error: Exception) -> HubkitError:
    """A fault of ours: short by default, with the traceback under HUBKIT_DEBUG=1; tokens never appear."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    have: list[str] = []
    fix = "HUBKIT_DEBUG=1 shows the traceback; please report it"
    if os.environ.get("HUBKIT_DEBUG") == "1":
        text = "".join(traceback.format_exception(error))
        have, fix = _TOKEN.sub("<token>", text).splitlines(), "please report this"
    what = _TOKEN.sub("<token>", f"{type(error).__name__}: {error}".strip().rstrip(":"))
    return HubkitError("HK-INTERNAL", f"hubkit failed: {what}", where=where, have=have, fix=fix)


def _reader_left() -> bool:
    """True when our stdout is the broken pipe (``hubkit list | head -1``): nobody is left to tell."""
    import select

    try:
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
        broken = any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
    except (AttributeError, OSError):
        return False  # no poll on this system, or a stdout without a descriptor
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return broken


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack, so that whatever is half written is removed on the way out."""
    raise SystemExit(TERMINATED)
