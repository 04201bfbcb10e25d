"""Damaged and forged files of untrusted origin: `python -m experiments.reliability.strangers`.

A small real file of each kind is changed at random a thousand times, by flipped bits, cuts, extreme
numbers and moved pieces; `forgeries` adds cases made by hand. Each must either be read, with values
that are checked where possible, or be refused in one line that names an option. Files are read in a
process of limited memory, which is ended when it takes too long, and which records every file that
it writes, process that it starts, connection that it opens and class that it unpickles.

The report is written after each kind and every hundred cases; a second call continues from there.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from experiments import reporting
from experiments.reliability.forgeries import FORGERIES
from experiments.reliability.material import KINDS
from experiments.trainer import cli
from experiments.trainer.options import ConfigError, one_line

PROGRAM = "experiments.reliability.strangers"
# Texts that replace a digit of a JSON file: signs, infinity, overflow of 32 and 64 bits, and more
# digits than Python's `int` reads (4300).
_NUMBERS = ("-1", "0", "1e999", "-0.0", "NaN", "2147483648", "18446744073709551616", "9" * 5000)


@dataclasses.dataclass(frozen=True)
class Config:
    """Read damaged and forged files of every kind, and count the outcomes."""

    #: Random cases of each kind.
    cases: int = 1000
    #: Seed of the random cases.
    seed: int = 0
    #: Time limit for reading one file. Rendering its chat template alone is given five seconds,
    #: which may take longer on a busy machine.
    seconds: float = 60.0
    #: Memory that reading one file may take beyond the good file's.
    megabytes: int = 1500
    #: Time after which the command writes the report and ends; a second call continues.
    minutes: float = 60.0
    #: Result file.
    out: Path = Path("experiments/results/strangers.json")


# One case -----------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Changes a file at random; returns the name of the change and the new content."""
    changes: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "flips": _flip, "cut": _cut, "extremes": _extreme, "moved": _move,
    }  # fmt: skip
    # In ten cases: six with flipped bits, two cut, one with an extreme number, one with a piece
    # moved.
    name = rng.choices(list(changes), (6, 2, 1, 1))[0]
    return name, changes[name](content, rng)


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        # Half of the flips fall into the first kilobyte, where headers are.
        end = min(len(changed), 1024) if rng.random() < 0.5 else len(changed)
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _extreme(content: bytes, rng: random.Random) -> bytes:
    """Writes a huge, negative or zero number over eight bytes, or in JSON over a digit."""
    start = rng.randrange(len(content))
    if content[:1] == b"{" and (digits := [i for i, c in enumerate(content) if 48 <= c <= 57]):
        start = rng.choice(digits)
        return content[:start] + rng.choice(_NUMBERS).encode() + content[start + 1 :]
    # Little-endian 64 bits: -1 (or 2^64 - 1), the largest, zero, and the most negative number.
    number = rng.choice((b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0" * 8, b"\0" * 7 + b"\x80"))
    return content[:start] + number + content[start + 8 :]


def _move(content: bytes, rng: random.Random) -> bytes:
    """Inserts a copy of a piece of the file in another place of it."""
    start, there = rng.randrange(len(content)), rng.randrange(len(content))
    piece = content[start : start + rng.randrange(1, 200)]
    return content[:there] + piece + content[there:]


def outcome(kind: str, directory: Path) -> tuple[str, str]:
    """Reads a directory; returns the outcome and its message.

    The outcome is `read`, `refused` (a clear `ConfigError`), `memory` (the limit was reached) or
    `fault` (any other error).
    """
    try:
        KINDS[kind].read(directory)
    except ConfigError as error:
        text = str(error)
        # Clear: one line that begins with the option, of readable length, without control
        # characters from the file that would reach a terminal.
        clear = text.startswith("`") and text.isprintable() and len(text) < 5000
        return ("refused" if clear else "fault"), text
    except MemoryError:
        return "memory", ""
    # Also exceptions that are no `Exception`, such as PyO3's panics in Rust extensions.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "fault", f"{type(error).__name__}: {error}"
    return "read", ""


def build(kind: str, case: int | str, good: Path, directory: Path, seed: int) -> str:
    """Makes the files of a case, the good ones with one changed; returns the name of the change."""
    shutil.copytree(good, directory, symlinks=True)
    if isinstance(case, str):
        FORGERIES[kind][case](directory)
        return "forged"
    # A generator for each case, so that a single case can be made again.
    rng = random.Random(f"{seed} {kind} {case}")
    target = rng.choice(sorted(f for f in directory.glob(KINDS[kind].target) if f.is_file()))
    name, content = damaged(target.read_bytes(), rng)
    target.write_bytes(content)
    return name


# The process that reads ---------------------------------------------------------------------------

# Python's audit events of new processes, connections, unpickled classes and loaded code.
_WATCHED = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class",
    "socket.connect", "ctypes.dlopen", "marshal.loads",
}  # fmt: skip


class Watch:
    """Records audit events of Python that reading a file should not cause.

    Attributes:
      seen: the events so far, as text.
      on: whether events are recorded.
    """

    def __init__(self, inside: Path):
        # An audit hook stays for the life of the process: `on` is its only switch.
        self._inside, self.seen, self.on = str(inside), [], False
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in str(mode or "") for letter in "wax+")
            writes = writes or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and isinstance(path, str) and not self._allowed(path):
                self.seen.append(f"writes {path}")
        # Chat templates are rendered in a process of their own, which runs this file.
        elif event in _WATCHED and "rendering.py" not in str(arguments):
            self.seen.append(f"{event} {arguments}"[:200])

    def _allowed(self, path: str) -> bool:
        return os.path.realpath(path).startswith(self._inside) or path == os.devnull


def serve(connection: Connection, scratch: Path, megabytes: int) -> None:
    """Reads directories on request until the connection sends None; runs in a process of its own.

    Args:
      connection: receives (kind, directory, good directory) and sends (outcome, message, events).
      scratch: the directory in which reading may write.
      megabytes: the limit of memory beyond the good file's.
    """
    watch = Watch(scratch)
    limited = ""
    while request := connection.recv():
        kind, directory, good = request
        if limited != kind:
            # The limit is set once for each kind, after the good file has been read, so that
            # imports and the good file's own memory do not count.
            outcome(kind, good)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 2**20, hard))
            limited = kind
        watch.seen, watch.on = [], True
        how = outcome(kind, directory)
        watch.on = False
        connection.send((*how, watch.seen))


class Reader:
    """A process that reads files, started anew after it died or was ended."""

    def __init__(self, scratch: Path, config: Config):
        self._scratch, self._config, self._process = scratch, config, None

    def read(self, kind: str, directory: Path, good: Path) -> tuple[str, str, list[str]]:
        """Reads a directory; returns the outcome, its message, and events that should not happen.

        Beside the outcomes of `outcome` there are `slow`, past the time limit, and `crashed`.
        """
        patience = self._config.seconds
        if self._process is None:
            self._start()
            patience += 120  # to import everything
        self._connection.send((kind, directory, good))
        try:
            if self._connection.poll(patience):
                return self._connection.recv()
            # A process in an endless loop does not listen: end it. The next case gets a new one.
            self.close()
            return "slow", f"not done after {patience:g} s", []
        except (EOFError, OSError):
            code = self.close()
            return "crashed", f"the process ended with {code}", []

    def close(self) -> int | None:
        """Ends the process; returns its exit code, or None if there is none."""
        if self._process is None:
            return None
        self._process.kill()
        self._process.join()
        code, self._process = self._process.exitcode, None
        return code

    def _start(self) -> None:
        # A fresh interpreter: a fork would inherit locks of JAX's threads.
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        arguments = (there, self._scratch, self._config.megabytes)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        there.close()  # else the end of the process would not close the connection


# All cases ----------------------------------------------------------------------------------------


def cases(kind: str, config: Config) -> list[int | str]:
    """Returns the cases of a kind: forgeries by name, then random cases by number."""
    return [*FORGERIES.get(kind, {}), *range(config.cases)]


def survey(config: Config, report: dict[str, Any], scratch: Path) -> Iterator[None]:
    """Reads the cases that the report lacks; yields whenever the report should be written."""
    reader, began = Reader(scratch, config), time.monotonic()
    for kind in KINDS:
        entry = report.setdefault(
            kind,
            {"done": 0, "outcomes": {}, "slowest, seconds": 0.0, "forged and read": [], "bad": []},
        )
        good = scratch / "good" / kind
        good.mkdir(parents=True, exist_ok=True)
        if not any(good.iterdir()):
            KINDS[kind].make(good)
        for case in cases(kind, config)[entry["done"] :]:
            _one(kind, case, good, scratch, reader, config, entry)
            if entry["done"] % 100 == 0:
                yield
            if time.monotonic() - began > 60 * config.minutes:
                reader.close()
                return
        reader.close()  # the next kind begins with a fresh one
        yield


def _one(
    kind: str,
    case: int | str,
    good: Path,
    scratch: Path,
    reader: Reader,
    config: Config,
    entry: dict[str, Any],
) -> None:
    """Reads one case and adds its outcome to the report's entry of its kind."""
    # 1. A directory beside the case, which links and paths of forgeries lead to.
    directory, outside = scratch / "case" / kind, scratch / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_text("untouched")
    before = _listing(outside)
    # 2. Make the case, read it and remove it.
    change = build(kind, case, good, directory, config.seed)
    began = time.monotonic()
    how, message, seen = reader.read(kind, directory, good)
    seconds = time.monotonic() - began
    shutil.rmtree(directory)
    # 3. Count the outcome. Anything but `read` and `refused` is bad, and so is any event.
    seen += ["something outside was changed"] if _listing(outside) != before else []
    counts = Counter(entry["outcomes"])
    counts[f"{change}: {how}"] += 1
    entry["outcomes"] = dict(sorted(counts.items()))
    entry["slowest, seconds"] = max(entry["slowest, seconds"], round(seconds, 1))
    entry["done"] += 1
    if (change, how) == ("forged", "read"):
        entry["forged and read"].append(case)
    if how not in ("read", "refused") or seen:
        entry["bad"].append([case, how, one_line(message), seen[:3]])


def _listing(directory: Path) -> list[tuple[str, bytes]]:
    """Returns the paths and contents of all files below a directory."""
    return [(str(f), f.read_bytes()) for f in sorted(directory.rglob("*")) if f.is_file()]


def main(arguments: Sequence[str]) -> int:
    """Continues the report and prints a summary. Returns 1 if a case ended badly, else 0."""
    config = cli.parse(Config, PROGRAM, arguments)
    found = json.loads(config.out.read_text()) if config.out.exists() else {}
    # A report of another seed has other cases: begin anew.
    same = found.get("config", {}).get("seed") == config.seed
    report = found["kinds"] if same else {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_HOME"] = f"{scratch}/hub"  # where `datasets` keeps its own files
        for _ in survey(config, report, Path(scratch)):
            reporting.write(config.out, config, kinds=report)
    reporting.write(config.out, config, kinds=report)
    for kind, entry in report.items():
        counts: Counter[str] = Counter()
        for name, count in entry["outcomes"].items():
            counts[name.partition(": ")[2]] += count
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        print(f"{kind}: {told}; at most {entry['slowest, seconds']} s; bad: {len(entry['bad'])}")
    return 1 if any(entry["bad"] for entry in report.values()) else 0


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))
