"""What `data.sources` names: files, folders, globs, stdin, saved data sets and data sets of the hub.

A source knows its kind and its fingerprint; `formats` reads it. Nothing is opened before it has proved to be a
regular file, and the network is asked for `hf:` alone.
"""

from __future__ import annotations

import atexit
import re
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from lora_gpt2.core.errors import DataError, NotFoundError, UsageError
from lora_gpt2.core.fingerprint import hash_file
from lora_gpt2.core.names import HUB, STDIN
from lora_gpt2.core.printable import count_of
from lora_gpt2.core.user_files import check_stdin
from lora_gpt2.data.read.archives import is_archive, unpack
from lora_gpt2.recipe import DataSettings

KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".rst": "text",
    ".org": "text",
    ".adoc": "text",
    ".html": "html",
    ".htm": "html",
    ".json": "json",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
CODE = [
    "py",
    "pyi",
    "js",
    "mjs",
    "jsx",
    "ts",
    "tsx",
    "java",
    "kt",
    "scala",
    "c",
    "h",
    "cc",
    "cpp",
    "cxx",
    "hpp",
    "cs",
    "go",
    "rs",
    "swift",
    "m",
    "rb",
    "php",
    "pl",
    "lua",
    "r",
    "jl",
    "dart",
    "hs",
    "ml",
    "ex",
    "erl",
    "clj",
    "sh",
    "bash",
    "zsh",
    "ps1",
    "sql",
    "vue",
    "svelte",
    "cmake",
    "proto",
    "tex",
]
"""File extensions of source code and markup like it, which is read as text and whose whitespace is left alone."""
KINDS |= {f".{extension}": "code" for extension in CODE}
DOCUMENTS = {
    ".pdf": "pdf",
    ".docx": "docx",
    ".odt": "odt",
    ".epub": "epub",
    ".srt": "subtitles",
    ".vtt": "subtitles",
    ".ass": "subtitles",
    ".eml": "mail",
    ".mbox": "mailbox",
}
KINDS |= DOCUMENTS
SHOWN = ", ".join(suffix for suffix, kind in KINDS.items() if kind != "code")
UNREAD_DOCUMENTS = (".doc", ".rtf", ".mobi", ".azw3", ".ps", ".djvu")
UNREAD_KINDS = 5
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words that name a split, as `datasets` knows them; they stand alone in a file's name or in that of its folder."""
ABOUT = ("readme", "license", "licence", "changelog", "notice", "citation")
OUR_FILES = "adapter_config.json", "train.signatures.npy"  # folders with one are of a store, or text prepared already


@dataclass(frozen=True)
class Source:
    """One thing to read; `path` is a file or a saved data set's folder, and None for the hub."""

    name: str
    kind: str
    path: Path | None

    @property
    def is_gzip(self) -> bool:
        """True for a file that is unpacked while it is read."""
        return self.path is not None and self.path.suffix.lower() == ".gz"

    @property
    def num_bytes(self) -> int:
        """Size on disk; 0 for the hub."""
        return sum(file.stat().st_size for file in self._files())

    def fingerprint(self) -> list[str]:
        """Returns what names the content: how it is read and a sha256 for each file, or the commit of a data set."""
        if self.path is None:
            from lora_gpt2.data.read.hub_dataset import find_commit

            return [self.name, find_commit(self.name.removeprefix(HUB))]
        kind = f"{self.kind}{'.gz' * self.is_gzip}"
        return [kind, *(hash_file(file) for file in self._files())]

    def _files(self) -> list[Path]:
        if self.path is None:
            return []
        return sorted(p for p in self.path.rglob("*") if p.is_file()) if self.path.is_dir() else [self.path]


def find_sources(specs: Sequence[str], settings: DataSettings) -> list[Source]:
    """Returns what some sources name, sorted within each; a folder gives every file in it that we can read.

    Raises:
        NotFoundError: a source names nothing.
        UsageError: a source is empty, or stdin holds nothing, or never ends.
        DataError: it is a device, a pipe, or of a kind that we do not read.
    """
    found: list[Source] = []
    for spec in specs:
        path = Path(spec)
        if not spec.strip():  # Path("") is the current folder
            raise UsageError("a source has no name", "name a file, a folder, a glob, - or hf:NAME; . is this folder")
        if spec == STDIN:
            found.append(_spool_stdin(settings.format))
        elif spec.startswith(HUB):
            found.append(Source(spec, "hub", None))
        elif _is_saved(path):
            found.append(Source(str(path), "saved", path))
        elif path.is_dir():
            found += _list_folder(path, settings)
        elif path.exists():
            found += _list_file(path, settings)
        else:
            found += _glob(spec, settings)
    return found


def _is_saved(path: Path) -> bool:
    """True for the folder of a data set that `datasets` saved."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def find_splits(specs: Sequence[str], settings: DataSettings) -> dict[str, list[Source]]:
    """Returns the sources of each split where their names say it: `train`, and `validation`, `test` or both.

    That is so where every file is named for a split (`train.jsonl`, `dev/part-1.txt`), those about the data excepted
    (README, LICENSE), and there is one to train on and one that is not. Else the result is empty.
    """
    sources = find_sources(specs, settings)
    named = [(source, _find_split(source)) for source in sources if source.path is not None and source.kind != "saved"]
    named = [(source, split) for source, split in named if split or not _is_about(source)]
    splits: dict[str, list[Source]] = {name: [] for name in SPLIT_WORDS}
    if len(named) < 2 or len(named) < sum(not _is_about(source) for source in sources) or not all(s for _, s in named):
        return {}
    for source, split in named:
        splits[split].append(source)
    return splits if splits["train"] and (splits["validation"] or splits["test"]) else {}


def _find_split(source: Source) -> str:
    """Returns the split that a file's name or its folder's names, the name first; "" if neither does."""
    assert source.path is not None
    for text in (source.path.name, source.path.parent.name):
        words = re.split(r"[^a-z]+", text.lower())
        found = [split for split, known in SPLIT_WORDS.items() if any(word in words for word in known)]
        if len(found) == 1:
            return found[0]
    return ""


def _is_about(source: Source) -> bool:
    return source.path is not None and is_about(source.path)


def is_about(path: Path) -> bool:
    """True for a file that is about a text, such as a README."""
    return path.name.lower().startswith(ABOUT)


def _find_kind(path: Path, settings: DataSettings) -> str | None:
    """Returns how a file is read: as the settings say, or by its name, with or without .gz."""
    inner = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return KINDS.get(inner.suffix.lower()) if settings.format == "auto" else settings.format


def is_readable(path: Path) -> bool:
    """True for a file that is read by its name, also compressed or as an archive; False for what is about the data."""
    return (is_archive(path) or _find_kind(path, DataSettings()) is not None) and not is_about(path)


def _name_file(path: Path, settings: DataSettings) -> Source:
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{path} is not a regular file", "write its content to a file, or pipe it in: --data -")
    kind = _find_kind(path, settings)
    if kind is None:
        hint = f"read by name are {SHOWN} and source code, also .gz; say what it is with --set data.format=text"
        if path.suffix.lower() in UNREAD_DOCUMENTS:
            hint = "convert it first, such as: pandoc -t plain -o file.txt file.rtf"
        raise DataError(f"{path}: files of kind '{path.suffix}' are not read", hint)
    return Source(str(path), kind, path)


def _list_archive(path: Path, settings: DataSettings) -> list[Source]:
    """Returns the files of an archive that can be read, named after it: `texts.zip/a.txt`."""
    folder = unpack(path)
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and _find_kind(file, settings)]
    found = [f for f in found if not any(p.startswith((".", "__MACOSX")) for p in f.relative_to(folder).parts)]
    if not found:
        raise DataError(f"{path} holds no file that is read: {SHOWN} or source code", "name another archive")
    named = [_name_file(file, settings) for file in found]
    return [replace(source, name=f"{path}/{Path(source.name).relative_to(folder)}") for source in named]


def _list_folder(folder: Path, settings: DataSettings) -> list[Source]:
    paths = [path for path in _list_visible(folder) if _is_read(path, settings)]
    if not paths:
        raise DataError(f"{folder} holds no {SHOWN} file and no source code", "name the files, or another folder")
    return [source for path in paths for source in _list_file(path, settings)]


def _list_visible(folder: Path) -> list[Path]:
    """Returns the files below a folder, without hidden ones and those of a store or of prepared text."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return [path for path in paths if not any((path.parent / name).exists() for name in OUR_FILES)]


def describe_unread(specs: Sequence[str], settings: DataSettings) -> list[str]:
    """Returns a line for each folder that holds files which are not read, with how many there are of each kind."""
    lines = []
    folders = [Path(spec) for spec in specs if spec.strip() and Path(spec).is_dir() and not _is_saved(Path(spec))]
    for folder in folders:
        unread = [path for path in _list_visible(folder) if not (_is_read(path, settings) or is_about(path))]
        kinds = Counter(path.suffix.lower() or "without an extension" for path in unread)
        shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(UNREAD_KINDS))
        more = ", and others" if len(kinds) > UNREAD_KINDS else ""
        lines += [f"{folder}: {count_of(len(unread), 'file')} of other kinds not read: {shown}{more}"] if unread else []
    return lines


def _is_read(path: Path, settings: DataSettings) -> bool:
    return is_archive(path) or _find_kind(path, settings) is not None


def _list_file(path: Path, settings: DataSettings) -> list[Source]:
    return _list_archive(path, settings) if is_archive(path) else [_name_file(path, settings)]


def _glob(spec: str, settings: DataSettings) -> list[Source]:
    path = Path(spec)
    root = Path(path.anchor) if path.is_absolute() else Path()
    pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else spec
    paths: list[Path] = []
    if any(c in spec for c in "*?["):
        try:
            paths = [p for p in sorted(root.glob(pattern)) if p.is_file() and _is_read(p, settings)]
        except ValueError as error:
            raise DataError(f"'{spec}' is not a pattern: {error}", "** stands alone, as in texts/**/*.txt") from error
    if not paths:
        raise NotFoundError(
            f"there is no file, folder or match for '{spec}'", f"check the path; read are {SHOWN} and source code"
        )
    return [source for path in paths for source in _list_file(path, settings)]


@lru_cache(maxsize=1)
def _spool_stdin(wanted: str) -> Source:
    """Keeps stdin in a file until the process ends, because it is read twice: for its fingerprint and its text."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("there is nothing on stdin", "pipe text in, as in: cat my_text.txt | lora-gpt2 prepare -")
    check_stdin()
    folder = Path(tempfile.mkdtemp(prefix="lora-gpt2-stdin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    head = sys.stdin.buffer.read(4096)
    path = folder / ("stdin.gz" if head.startswith(b"\x1f\x8b") else "stdin")
    with path.open("wb") as file:
        piece = head
        while piece:
            file.write(piece)
            piece = sys.stdin.buffer.read(1 << 20)
    if wanted == "auto":
        start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        kinds = {b"{": "jsonl", b"[": "json", b"<!doctype html": "html", b"<html": "html"}
        wanted = next((kind for mark, kind in kinds.items() if start.startswith(mark)), "text")
    return Source("<stdin>", wanted, path)
