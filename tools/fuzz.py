"""Feeds damaged input to every door of the program and reports what breaks a promise.

    python tools/fuzz.py --seconds 600 --seed 1 --kept /tmp/findings [--only archive --only body]

Promises: no exit code 1 (which means a bug), no HTTP status 500, 10 seconds of CPU at most for an input under 1 MB, and
no more memory than `MEMORY_BYTES` above what the process had before. Each finding's input is kept, with what was seen;
`last.*` is the input on which the process died, if it did.
Inputs are good ones that were changed: bytes flipped, cut, doubled and replaced; JSON values replaced by odd ones.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_gpt2 import cli
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import load_base
from lora_gpt2.model.runtime import choose_runtime
from lora_gpt2.recipe import GenerateSettings, ServeSettings
from lora_gpt2.serving.api import Access, Server
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.files import Origin, publish_adapter
from tests.builders import make_adapter, make_base_folder, make_text
from tests.serving import ask, serving
from tests.unit.data.read.test_documents import WRITERS, pack

SECONDS_PER_INPUT = 10
MEMORY_BYTES = 1_000_000_000
CONTROLS = {"recipe": 1, "manifest": 2, "folder": 4, "archive": 2, "data": 60, "base_folder": 4, "body": 20}
"""How often each door is opened with good input."""
WORDS = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"{",
    b"]",
    b"\r",
    b"\n\n",
    b"1e999",
    b"-1",
    b"NaN",
    b"<!--",
    b"%",
    b"&#x110000;",
    b"../",
    b"\x1b[2J",
    b"\xed\xa0\x80",
    b"9" * 40,
    b"[" * 2000,
    b"<div>" * 500,
    b"a" * 70_000,
)
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    2**200,
    1e308,
    -0.0,
    float("inf"),
    float("nan"),
    "",
    "x",
    "../../etc/passwd",
    "/dev/zero",
    "\x00",
    "\ud800",
    "😀" * 50,
    "a" * 5000,
    [],
    {},
    [[]],
    [None],
    {"": None},
    ["a"] * 500,
    "1",
    "true",
    "base",
    "law",
    "law@1",
    "law=0.5",
    "float32",
    1.5,
    [1, "a"],
    {"a": {"b": {}}},
)


class TooSlowError(Exception):
    """An input took longer than it may."""


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Returns the bytes with one to six changes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        place, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place:place] = rng.choice(WORDS)
        elif kind == 2:
            del data[place : min(end, place + rng.choice((1, 8, 200)))]
        elif kind == 3:
            data[place:place] = data[place : min(end, place + 5000)]
        elif kind == 4:
            data[place:end] = rng.choice(WORDS)
        elif kind == 5:
            del data[place:]
        else:
            data[place : place + 4] = rng.randbytes(4)
    return bytes(data)


def change_json(value: Any, rng: random.Random) -> Any:
    """Returns the value with one to three of its parts replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_iter_places(value))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        parent, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(("", "x", "__proto__", "a" * 300, "\ud800", str(key).upper()))] = parent.pop(key)
        elif kind == 2 and isinstance(parent[key], int | float):
            parent[key] = parent[key] * rng.choice((-1, 0, 1e9, 0.5, 10**6))
        elif kind == 3 and isinstance(parent[key], str):
            parent[key] = change_bytes(parent[key].encode("utf-8", "replace"), rng).decode("utf-8", "replace")
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _iter_places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _iter_places(item)


def dump(value: Any) -> bytes:
    """Returns JSON as the strictest and the laxest writers make it: NaN and lone surrogates included."""
    return json.dumps(value).encode()


class Fuzzer:
    """The good inputs, the doors, and what was found."""

    def __init__(self, root: Path, kept: Path, rng: random.Random) -> None:
        self.root, self.kept, self.rng = root, kept, rng
        self.base = make_base_folder(root / "base")
        self.store = Store(root / "store")
        base = load_base(str(self.base), choose_runtime("float32"))
        for name in ("law", "code"):
            publish_adapter(self.store, name, make_adapter(base.config), base, Origin())
        os.environ["LORA_GPT2_STORE"] = str(root / "store")
        self.command("adapters", "export", "law", root / "folder")
        self.command("adapters", "verify", "law")  # imports PEFT
        self.counts: dict[str, int] = {}
        self.held_out = root / "held-out.txt"
        self.held_out.write_text("A text that nothing else holds, to validate on. " * 20, encoding="utf-8")
        self.findings = 0
        self.is_control = False
        self.port = 0

    def command(self, *arguments: object) -> tuple[int, str]:
        """Returns the exit code of a command line and what it wrote."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = cli.run(["--debug", *map(str, arguments)])
        return code, out.getvalue()

    def expect(self, kind: str, content: bytes, act: Callable[[], tuple[int, str]], suffix: str = "") -> None:
        """Does something with an input and keeps the input if a promise is broken."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        (self.kept / f"last{suffix or '.bin'}").write_bytes(content)  # what is left if the process itself dies
        before, start, seen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), ""

        def stop(*_: object) -> None:
            raise TooSlowError

        signal.signal(signal.SIGPROF, stop)  # of CPU, so that what else the machine does is no finding
        signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_INPUT)
        try:
            code, said = act()
            if self.is_control and code != 0:
                seen = f"good input is refused, so nothing behind it is tried: code {code}\n{said}"
            elif code in (1, 500) or ("Traceback" in said and "LoraGpt2Error" not in said and code in (0, 1)):
                seen = f"code {code}\n{said}"
        except BaseException:  # noqa: BLE001 - whatever comes out is a finding
            seen = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if seconds > SECONDS_PER_INPUT and len(content) < 1_000_000:
            seen = f"{seconds:.1f} s\n{seen}"
        if grown > MEMORY_BYTES:
            seen = f"{grown / 1e6:,.0f} MB more\n{seen}"
        if seen:
            self.findings += 1
            stem = self.kept / f"{kind.replace('.', '-')}-{self.findings:03d}"
            stem.with_suffix(suffix or ".bin").write_bytes(content)
            stem.with_suffix(".seen").write_text(seen, encoding="utf-8", errors="replace")
            print(f"{kind}: {seen.strip().splitlines()[-1][:150]}  -> {stem}", flush=True)

    def recipe(self) -> None:
        """A recipe, changed as text or as data."""
        good = (
            b'name: law\nbase: nano\ndata:\n  sources: ["text.txt"]\n  rules: {whitespace: "on"}\n'
            b"  min_characters: 3\nlora:\n  rank: 8\n  alpha: 16\n  targets: [c_attn, mlp.c_proj]\n"
            b"  rank_pattern: {c_attn: 4}\ntrain:\n  steps: 5\n"
            b"  learning_rate: 1e-3\n  max_grad_norm: 1.0\ngenerate:\n  temperature: 0.7\n"
        )
        content = self.change(good)
        path = self.root / "recipe.yaml"
        path.write_bytes(content)
        self.expect("recipe", content, lambda: self.command("recipes", "check", path), ".yaml")

    def manifest(self) -> None:
        """A version of the store with a changed manifest or PEFT configuration."""
        name = self.rng.choice(("manifest.json", "adapter_config.json"))
        folder = self.store.resolve("law")
        path = folder / name
        good = path.read_bytes()
        content = self.damage(good)
        path.write_bytes(content)
        verb = self.rng.choice(
            (
                ["list"],
                ["show", "law"],
                ["verify", "law"],
                ["export", "law", self.root / "gone"],
                ["diff", "law", "code"],
            )
        )
        verb = ["show", "law"] if self.is_control else verb
        try:
            self.expect("manifest", content, lambda: self.command("adapters", *verb), ".json")
        finally:
            path.write_bytes(good)
            shutil.rmtree(self.root / "gone", ignore_errors=True)

    def damage(self, good: bytes) -> bytes:
        """Returns JSON changed as data, or as bytes."""
        if self.is_control or self.rng.random() >= 0.7:
            return self.change(good)
        return dump(change_json(json.loads(good), self.rng))

    def change(self, good: bytes) -> bytes:
        """Returns bytes changed, or as they are while the doors are tried with good input."""
        return good if self.is_control else change_bytes(good, self.rng)

    def folder(self) -> None:
        """An adapter of somebody else: its configuration or its weights changed, imported from a folder."""
        work = self.root / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.root / "folder", work)
        if self.rng.random() < 0.7:
            (work / "manifest.json").unlink(missing_ok=True)
        name = self.rng.choice(("adapter_config.json", "adapter_model.safetensors"))
        good = (work / name).read_bytes()
        content = self.damage(good) if name.endswith("json") else self.change(good)
        if name.endswith("safetensors") and self.rng.random() < 0.6:  # the header alone
            size = int.from_bytes(good[:8], "little")
            header = self.damage(good[8 : 8 + size])
            content = len(header).to_bytes(8, "little") + header + good[8 + size :]
        (work / name).write_bytes(content)
        self.bring(f"folder-{name.rpartition('.')[2]}", content, work)

    def bring(self, kind: str, content: bytes, source: Path) -> None:
        """Imports a source into the store, and forgets it again."""
        arguments = ("adapters", "import", source, "--name", "new", "--base", self.base)
        self.expect(kind, content, lambda: self.command(*arguments), "".join(source.suffixes))
        shutil.rmtree(self.root / "store" / "new", ignore_errors=True)

    def archive(self) -> None:
        """A tar.gz or zip of an adapter, with odd members or damaged bytes."""
        is_zip, out = self.rng.random() < 0.3 and not self.is_control, io.BytesIO()
        files = {path.name: path.read_bytes() for path in (self.root / "folder").iterdir() if path.is_file()}
        odd = [*files.items()]
        for _ in range(0 if self.is_control else self.rng.randint(0, 3)):
            name = self.rng.choice(
                ("../x", "/etc/x", "a/b/c", "", ".", "con", "x" * 300, "manifest.json", "\x00", "adapter_config.json")
            )
            odd.insert(
                self.rng.randrange(len(odd) + 1),
                (name, self.rng.choice((b"", b"{}", b"x" * 100_000, b"\x00" * 3_000_000))),
            )
        with (
            contextlib.suppress(ValueError, IndexError, zipfile.LargeZipFile),
            warnings.catch_warnings(action="ignore"),
        ):
            if is_zip:
                with zipfile.ZipFile(out, "w") as file:
                    for name, data in odd:
                        file.writestr(name or "x", data)
            else:
                with tarfile.open(
                    fileobj=out, mode="w:gz" if self.is_control else self.rng.choice(("w:gz", "w", "w:xz"))
                ) as file:
                    for name, data in odd:
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        if not self.is_control and self.rng.random() < 0.25:
                            kinds = (tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE)
                            info.type = self.rng.choice(kinds)
                        info.linkname = self.rng.choice(("", "/etc/passwd", "adapter_config.json"))
                        file.addfile(info, io.BytesIO(data))
        content = out.getvalue() if self.rng.random() < 0.4 else self.change(out.getvalue())
        path = self.root / ("a.tar.gz" if self.is_control else self.rng.choice(("a.tar.gz", "a.tar", "a.zip", "a.tgz")))
        path.write_bytes(content)
        self.bring("archive", content, path)
        path.unlink()

    def data(self) -> None:
        """A file of text, tables or pages, changed, and prepared for training."""
        suffix, content = self.rng.choice(self.texts())
        changed = self.change(content)
        if not self.is_control and suffix in (".jsonl", ".json") and self.rng.random() < 0.5:
            rows = [json.loads(line) for line in content.decode().splitlines()]
            changed = b"\n".join(dump(change_json(row, self.rng)) for row in rows)
        if self.rng.random() < 0.15 and suffix not in (".zip", ".tar.gz"):
            suffix, changed = f"{suffix}.gz", gzip.compress(changed)
        path = self.root / f"text{suffix}"
        path.write_bytes(changed)
        extra = self.rng.choice(((), ("--skip-bad",), ("--set", "data.profile=raw"), ("--set", "data.profile=code")))
        arguments = ("prepare", path, "--base", self.base, "--set", f"data.validation=[{self.held_out}]", *extra)
        self.expect(f"data{suffix}", changed, lambda: self.command(*arguments), suffix)
        path.unlink()
        shutil.rmtree(os.environ["LORA_GPT2_CACHE"], ignore_errors=True)

    def texts(self) -> list[tuple[str, bytes]]:
        """Returns a good file of each format."""
        if not hasattr(self, "_texts"):
            import pyarrow as pa
            import pyarrow.parquet as pq

            rows = [
                {
                    "text": f"The king of {i} went out. " * 20,
                    "n": i,
                    "messages": [
                        {"role": "user", "content": f"Why {i}?"},
                        {"role": "assistant", "content": "Because."},
                    ],
                }
                for i in range(40)
            ]
            table = io.BytesIO()
            pq.write_table(pa.table({"text": [row["text"] for row in rows], "n": [row["n"] for row in rows]}), table)
            page = "".join(
                f"<p class='a'>The king &amp; queen of {i} <b>went</b> out.</p><pre>x\n y</pre>" for i in range(60)
            )
            self._texts = [
                (".txt", make_text(80).encode()),
                (".parquet", table.getvalue()),
                (".md", b"---\na: b\n---\n# Title\n\n" + b"Some words here. " * 80),
                (".html", f"<html><head><title>t</title></head><body><nav>x</nav>{page}</body></html>".encode()),
                (".jsonl", "\n".join(json.dumps(row) for row in rows).encode()),
                (".csv", b"text,label\n" + b'"The king, the queen and a line",1\n' * 60),
                (".tsv", b"text\tlabel\n" + b"The king and the queen\t1\n" * 60),
                (".py", b"def f(x):\n    return x + 1\n\n\n" * 60),
                (".mbox", b"From a@b Mon\nSubject: one\n\nThe king of the country.\n\n" * 30),
                *self.documents(),
            ]
        return self._texts

    def documents(self) -> list[tuple[str, bytes]]:
        """Returns a good document of each kind, and archives of them."""
        found = []
        for suffix, write in WRITERS.items():
            path = self.root / f"good{suffix}"
            write(path)
            found.append((suffix, path.read_bytes()))
        for name in ("good.zip", "good.tar.gz"):
            pack(self.root / name, {f"texts/a{suffix}": content for suffix, content in found})
            found.append((name.removeprefix("good"), (self.root / name).read_bytes()))
        return found

    def base_folder(self) -> None:
        """A base whose configuration, tokenizer or weights are changed."""
        work = self.root / "base-work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.base, work)
        name = self.rng.choice(("config.json", "vocab.json", "merges.txt", "model.safetensors"))
        good = (work / name).read_bytes()
        content = self.damage(good) if name.endswith("json") else self.change(good)
        if name.endswith("safetensors") and self.rng.random() < 0.6:
            size = int.from_bytes(good[:8], "little")
            header = self.damage(good[8 : 8 + size])
            content = len(header).to_bytes(8, "little") + header + good[8 + size :]
        (work / name).write_bytes(content)
        arguments = ("generate", "the king", "--base", work, "--set", "generate.max_new_tokens=3")
        self.expect(f"base-{name}", content, lambda: self.command(*arguments), Path(name).suffix)

    def body(self) -> None:
        """The body of a request to the server."""
        path, good = self.rng.choice(
            (
                (
                    "/v1/completions",
                    {
                        "model": "law",
                        "prompt": ["the", "king"],
                        "max_tokens": 3,
                        "temperature": 0.5,
                        "top_p": 0.9,
                        "n": 1,
                        "stop": ["x"],
                        "seed": 1,
                        "logprobs": 2,
                        "logit_bias": {"5": 1.0},
                        "stream": False,
                        "echo": True,
                    },
                ),
                ("/v1/adapters/load", {"name": "law"}),
                ("/v1/choices", {"chosen": "law", "models": ["law", "code"], "prompt": "the king", "seed": 1}),
                (
                    "/v1/completions",
                    {"model": "law:0.5+code:0.5", "prompt": [5, 6, 7], "max_tokens": 2, "stream": True},
                ),
            )
        )
        content = self.damage(dump(good))

        def act() -> tuple[int, str]:
            headers = [("Authorization", "Bearer admin")] if path.startswith("/v1/adapters") else []
            status, _, answer = ask(self.port, path, content, headers)
            code = 500 if status == 500 or '"code": "internal' in str(answer) else 0
            return (code or status * (self.is_control and status != 200)), f"{status} {answer}"[:2000]

        self.expect(f"body{path.replace('/', '-')}", content, act, ".json")

    def try_good_input(self, doors: list[str]) -> None:
        """Opens each door with good input, which must be accepted: what is refused at once tests nothing."""
        self.is_control = True
        for door in dict.fromkeys(doors):
            for _ in range(CONTROLS[door]):
                getattr(self, door)()
        self.is_control, self.counts = False, {}

    def run(self, seconds: float, only: list[str]) -> None:
        """Fuzzes until the time is up."""
        doors = ["recipe", "manifest", "folder", "archive", "data", "data", "base_folder", "body", "body"]
        doors = [door for door in doors if not only or door in only]
        base = load_base(str(self.base), choose_runtime("float32"))
        shutil.copytree(self.root / "store", self.root / "served")
        session = Session(base, Store(self.root / "served"))
        with serving(
            Server(
                session=session, defaults=GenerateSettings(), limits=ServeSettings(), access=Access(admin_key="admin")
            )
        ) as self.port:
            self.try_good_input(doors)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                getattr(self, self.rng.choice(doors))()


def main() -> int:
    """Runs the fuzzer; exits with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kept", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--only", action="append", default=[])
    options = parser.parse_args()
    options.kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        os.environ["LORA_GPT2_CACHE"], os.environ["LORA_GPT2_LOG"] = f"{root}/cache", "off"
        fuzzer = Fuzzer(Path(root), options.kept, random.Random(options.seed))
        start = time.process_time()
        fuzzer.run(options.seconds, options.only)
    total, seconds = sum(fuzzer.counts.values()), time.process_time() - start
    print(f"{total:,} inputs in {seconds:,.0f} s of CPU, {fuzzer.findings} findings")
    print(json.dumps(fuzzer.counts, sort_keys=True))
    return 1 if fuzzer.findings else 0


if __name__ == "__main__":
    sys.exit(main())
