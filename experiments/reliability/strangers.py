"""Files from strangers, damaged and forged: `python -m experiments.reliability.strangers`.

A small real file of each kind is changed at random, by flipped bits, cuts, extreme numbers and
moved pieces, a thousand times; `forgeries` adds cases made by hand. Each must be read, with values
that are checked where there is something to check them by, or be refused in one line that names an
option. Reading happens in a process with a limit on memory, which is ended when it takes too long,
and which notes what it writes, starts, connects to or unpickles.

The report is written after each kind and every hundred cases; a second call goes on from there.
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
# Text that numbers of a JSON file may turn into.
_NUMBERS = ("-1", "0", "1e999", "-0.0", "NaN", "2147483648", "18446744073709551616", "9" * 5000)


@dataclasses.dataclass(frozen=True)
class Config:
    """Read damaged and forged files of every kind, and count how that ends."""

    cases: int = 1000
    """Random cases of each kind."""
    seed: int = 0
    """Seed of the cases."""
    seconds: float = 60.0
    """How long reading one file may take; rendering its chat template alone is given five, of a
    processor that others may use too."""
    megabytes: int = 1500
    """How much more memory than the good file reading one may take."""
    minutes: float = 60.0
    """After so many minutes the report is written; a second call goes on."""
    out: Path = Path("experiments/results/strangers.json")
    """Result file."""


# One case -----------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A random change of a file, and its name."""
    changes: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "flips": _flip, "cut": _cut, "extremes": _extreme, "moved": _move,
    }  # fmt: skip
    # Of ten cases, six have flipped bits and two are cut.
    name = rng.choices(list(changes), (6, 2, 1, 1))[0]
    return name, changes[name](content, rng)


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        # Half of them in the first kilobyte, where headers are.
        end = min(len(changed), 1024) if rng.random() < 0.5 else len(changed)
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _extreme(content: bytes, rng: random.Random) -> bytes:
    """Eight bytes that are a huge, negative or zero number, or, in text, a number's new digits."""
    start = rng.randrange(len(content))
    if content[:1] == b"{" and (digits := [i for i, c in enumerate(content) if 48 <= c <= 57]):
        start = rng.choice(digits)
        return content[:start] + rng.choice(_NUMBERS).encode() + content[start + 1 :]
    number = rng.choice((b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0" * 8, b"\0" * 7 + b"\x80"))
    return content[:start] + number + content[start + 8 :]


def _move(content: bytes, rng: random.Random) -> bytes:
    """A piece of the file in another place of it."""
    start, there = rng.randrange(len(content)), rng.randrange(len(content))
    piece = content[start : start + rng.randrange(1, 200)]
    return content[:there] + piece + content[there:]


def outcome(kind: str, directory: Path) -> tuple[str, str]:
    """How reading a directory ends, `read`, `refused` or `fault`, with the message."""
    try:
        KINDS[kind].read(directory)
    except ConfigError as error:
        text = str(error)
        # One line for a person, that begins with the option and has no control characters.
        clear = text.startswith("`") and text.isprintable() and len(text) < 5000
        return ("refused" if clear else "fault"), text
    except MemoryError:
        return "memory", ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "fault", f"{type(error).__name__}: {error}"
    return "read", ""


def build(kind: str, case: int | str, good: Path, directory: Path, seed: int) -> str:
    """Makes the files of a case: the good ones, of which one is changed; returns the change."""
    shutil.copytree(good, directory, symlinks=True)
    if isinstance(case, str):
        FORGERIES[kind][case](directory)
        return "forged"
    rng = random.Random(f"{seed} {kind} {case}")
    target = rng.choice(sorted(f for f in directory.glob(KINDS[kind].target) if f.is_file()))
    name, content = damaged(target.read_bytes(), rng)
    target.write_bytes(content)
    return name


# The process that reads ---------------------------------------------------------------------------

_WATCHED = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class",
    "socket.connect", "ctypes.dlopen", "marshal.loads",
}  # fmt: skip


class Watch:
    """Notes events of Python that reading a file has no business with."""

    def __init__(self, inside: Path):
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
        elif event in _WATCHED and "rendering.py" not in str(arguments):
            self.seen.append(f"{event} {arguments}"[:200])

    def _allowed(self, path: str) -> bool:
        return os.path.realpath(path).startswith(self._inside) or path == os.devnull


def serve(connection: Connection, scratch: Path, megabytes: int) -> None:
    """Reads one directory after another, as long as it is asked to."""
    watch = Watch(scratch)
    limited = ""
    while request := connection.recv():
        kind, directory, good = request
        if limited != kind:
            # What importing and reading the good file takes is not counted.
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
    """A process that reads, started anew when one dies or is ended."""

    def __init__(self, scratch: Path, config: Config):
        self._scratch, self._config, self._process = scratch, config, None

    def read(self, kind: str, directory: Path, good: Path) -> tuple[str, str, list[str]]:
        """How reading ends, the message, and what was seen that should not happen."""
        patience = self._config.seconds
        if self._process is None:
            self._start()
            patience += 120  # to import everything
        self._connection.send((kind, directory, good))
        try:
            if self._connection.poll(patience):
                return self._connection.recv()
            self.close()
            return "slow", f"not done after {patience:g} s", []
        except (EOFError, OSError):
            code = self.close()
            return "crashed", f"the process ended with {code}", []

    def close(self) -> int | None:
        """Ends the process."""
        if self._process is None:
            return None
        self._process.kill()
        self._process.join()
        code, self._process = self._process.exitcode, None
        return code

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        arguments = (there, self._scratch, self._config.megabytes)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        there.close()


# All cases ----------------------------------------------------------------------------------------


def cases(kind: str, config: Config) -> list[int | str]:
    """Forgeries by name, then random cases by number."""
    return [*FORGERIES.get(kind, {}), *range(config.cases)]


def survey(config: Config, report: dict[str, Any], scratch: Path) -> Iterator[None]:
    """Reads what the report does not have yet; yields where it may be written."""
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
    """Reads one case and notes how that ended."""
    directory, outside = scratch / "case" / kind, scratch / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_text("untouched")
    before = _listing(outside)
    change = build(kind, case, good, directory, config.seed)
    began = time.monotonic()
    how, message, seen = reader.read(kind, directory, good)
    seconds = time.monotonic() - began
    shutil.rmtree(directory)
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
    return [(str(f), f.read_bytes()) for f in sorted(directory.rglob("*")) if f.is_file()]


def main(arguments: Sequence[str]) -> int:
    """Goes on with the report; exit code 1 if a case ended otherwise than it may."""
    config = cli.parse(Config, PROGRAM, arguments)
    found = json.loads(config.out.read_text()) if config.out.exists() else {}
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
