"""Which file names and which kinds of file may be in an artifact: checked before anything is written or read.

Names come from strangers (a registry's listing, a manifest, an index). A name is accepted only when it means the
same file on every file system hubkit may meet: POSIX, NTFS, APFS, HFS+. Names are taken literally, nothing is
decoded: ``%2e%2e`` is a strange name, not a way up.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

from hubkit.errors import HubkitError

SEGMENT_BYTES: Final = 255
"""Longest segment in UTF-8 bytes: the limit of ext4, APFS and NTFS."""
PATH_BYTES: Final = 1024
"""Longest whole path in UTF-8 bytes."""

_DEVICES: Final = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$", "clock$"]
    + [f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"]
)
_FOLDERS: Final = frozenset({".git", "git~1", ".cache"})
_WINDOWS: Final = frozenset('<>"|?*')
_HIDDEN: Final = {
    "Cc": "a control character",
    "Cf": "an invisible or bidirectional format character",
    "Cs": "a lone surrogate",
    "Co": "a private-use character",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}

_SUFFIXES: Final = frozenset({".safetensors", ".json", ".md", ".txt", ".jinja", ".model"})
_BARE: Final = frozenset({"license", "licence", "notice", "copying", "readme", ".gitattributes"})
_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".dill"})
_MAGIC: Final = (
    (b"PK\x03\x04", "a zip archive (the form of PyTorch files)", True),
    (b"PK\x05\x06", "an empty zip archive", True),
    (b"\x93NUMPY", "a NumPy file", True),
    (b"\x7fELF", "an ELF program", False),
    (b"MZ", "a Windows program", False),
    (b"\xcf\xfa\xed\xfe", "a macOS program", False),
    (b"\xca\xfe\xba\xbe", "a macOS program or Java class", False),
    (b"\0asm", "a WebAssembly program", False),
    (b"#!", "a script", False),
    (b"\x1f\x8b", "a gzip archive", False),
    (b"BZh", "a bzip2 archive", False),
    (b"\xfd7zXZ\0", "an xz archive", False),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", False),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", False),
    (b"\x89HDF", "an HDF5 file", False),
)
_RESULTS = re.compile(r"\.eval_results/[A-Za-z0-9][\w.-]*\.yaml", re.ASCII)
"""Figures of benchmarks, where the Hub looks for them; no other YAML file is taken."""


def check_name(path: str, where: str) -> None:
    """Refuse `path` unless it names one file inside an artifact's folder, the same one on every file system.

    Args:
        path: relative, ``/`` between segments, as a listing or a manifest gives it.
        where: what the name stands in, for the message.

    Raises:
        HubkitError: ``HK-NAME``, with every fault of the name.
    """
    faults = _faults(path)
    if faults:
        raise _refusal([f"{path!r}: {fault}" for fault in faults], where)


def check_names(paths: Iterable[str], where: str) -> None:
    """`check_name` for all files of one artifact, and that no two of them could be one file or a file and its folder.

    Two names are twins when they are equal after case folding and Unicode normalization: such a pair is one file on
    NTFS and APFS, and which of the two wins depends on the order of writing.

    Raises:
        HubkitError: ``HK-NAME``, with every fault of every name.
    """
    listed = list(paths)
    faults = [f"{path!r}: {fault}" for path in listed for fault in _faults(path)]
    raise_for = faults + _clashes(listed)
    if raise_for:
        raise _refusal(raise_for, where)


def check_allowed(path: str, head: bytes, where: str) -> None:
    """Refuse a file that is not of the few kinds an artifact may hold; the content counts, whatever the suffix.

    Args:
        path: the file's name inside the artifact.
        head: the first bytes of its content, 512 are enough; empty for an empty file.
        where: the artifact, for the message.

    Raises:
        HubkitError: ``HK-PICKLE`` for what runs code when it is loaded, ``HK-FORBIDDEN-FILE`` for everything else.
    """
    name = path.rsplit("/", 1)[-1].casefold()
    suffix = name[name.rfind(".") :] if "." in name else ""
    found = _sniff(head, tensors=suffix == ".safetensors")
    if found is not None:
        kind, pickle = found
        raise _forbidden(path, where, f"it is {kind}", pickle=pickle)
    if suffix in _PICKLES:
        raise _forbidden(path, where, f"'{suffix}' files hold pickled or unchecked binary data", pickle=True)
    if suffix not in _SUFFIXES and name not in _BARE and not _RESULTS.fullmatch(path):
        raise _forbidden(path, where, f"files named '*{suffix}'" if suffix else "a file without suffix", pickle=False)


def _faults(path: str) -> list[str]:
    if not path:
        return ["an empty name"]
    faults: list[str] = []
    hidden = sorted({_HIDDEN[kind] for c in path if (kind := unicodedata.category(c)) in _HIDDEN})
    faults += [f"contains {what}" for what in hidden]
    if "\\" in path:
        faults.append("contains a backslash")
    if ":" in path:
        faults.append("contains a colon (a drive or an alternate stream)")
    if marks := sorted(_WINDOWS.intersection(path)):
        faults.append(f"contains {' '.join(marks)}, which Windows forbids")
    if path.startswith("/"):
        faults.append("is absolute")
    if not unicodedata.is_normalized("NFC", path):
        faults.append("is not in Unicode normal form NFC")
    elif {"/", "\\", ":"} & (set(unicodedata.normalize("NFKC", path)) - set(path)):
        faults.append("contains a character that some systems turn into a separator")
    if len(path.encode("utf-8", "surrogatepass")) > PATH_BYTES:
        faults.append(f"is longer than {PATH_BYTES} bytes")
    segments = path.removeprefix("/").split("/")
    return faults + list(dict.fromkeys(fault for segment in segments for fault in _segment_faults(segment)))


def _segment_faults(segment: str) -> list[str]:
    if not segment:
        return ["has an empty segment"]
    if segment in (".", ".."):
        return [f"has the segment '{segment}'"]
    faults: list[str] = []
    if segment[-1] == "." or segment[-1].isspace():
        faults.append("has a segment that ends in a dot or a space")
    if len(segment.encode("utf-8", "surrogatepass")) > SEGMENT_BYTES:
        faults.append(f"has a segment longer than {SEGMENT_BYTES} bytes")
    folded = segment.casefold().rstrip(". ")
    if folded in _FOLDERS:
        faults.append(f"has the segment '{folded}', which belongs to other tools")
    # Windows takes the device before the first dot, spaces before the dot ignored: 'con .txt' is the console.
    if folded.split(".", 1)[0].rstrip() in _DEVICES:
        faults.append(f"has the segment '{segment}', a device name on Windows")
    return faults


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def _clashes(paths: list[str]) -> list[str]:
    faults: list[str] = []
    files: dict[str, str] = {}
    for path in paths:
        key = _fold(path)
        if (first := files.get(key)) is None:
            files[key] = path
        else:
            same = "is listed twice" if first == path else f"and {path!r} are one file where case or form is ignored"
            faults.append(f"{first!r}: {same}")
    folders: dict[str, str] = {}
    for path in paths:
        for end in (i for i, c in enumerate(path) if c == "/"):
            folder = path[:end]
            first = folders.setdefault(_fold(folder), folder)
            if first != folder:
                faults.append(f"{first + '/'!r}: and {folder + '/'!r} are one folder where case or form is ignored")
            if (file := files.get(_fold(folder))) is not None:
                faults.append(f"{file!r}: is a file, and a folder in {path!r}")
    return list(dict.fromkeys(faults))


def _sniff(head: bytes, *, tensors: bool) -> tuple[str, bool] | None:
    # A safetensors file begins with its header's length, and 640 is b'\x80\x02' like a pickle: the brace after a
    # length below 2**32 decides. No pickle goes on with the zero byte that such a length has at index 4.
    if tensors and head[4:9] == b"\0\0\0\0{":
        return None
    for magic, kind, pickle in _MAGIC:
        if head.startswith(magic):
            return kind, pickle
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        return "a pickle", True
    if head[257:262] == b"ustar":
        return "a tar archive", False
    return None


def _refusal(faults: list[str], where: str) -> HubkitError:
    return HubkitError(
        "HK-NAME",
        "a file name is not safe on every system" if len(faults) == 1 else "file names are not safe on every system",
        where=where,
        want="relative paths of plain segments with '/' between them",
        have=faults,
        fix="rename the files where they were published",
    )


def _forbidden(path: str, where: str, have: str, *, pickle: bool) -> HubkitError:
    if pickle:
        what, fix = "a pickled file can run code when it is loaded", "convert the weights to safetensors"
    else:
        what, fix = "a file of this kind does not belong in an artifact", "remove the file from the artifact"
    allowed = f"{' '.join(sorted(_SUFFIXES))} LICENSE NOTICE README .gitattributes"
    code = "HK-PICKLE" if pickle else "HK-FORBIDDEN-FILE"
    return HubkitError(code, what, where=f"{where}  {path}", want=allowed, have=have, fix=fix)
