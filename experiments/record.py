"""Result files that say what they rest on: configuration, versions, device and commit."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax

from experiments import compatibility
from experiments.config import make_directory


def write(path: Path, config: Any, **results: Any) -> dict[str, Any]:
    """Writes `results` under a description of what made them; returns all that was written.

    Args:
      path: the JSON file; its directory is made.
      config: a dataclass.
      **results: what JSON can hold.

    Raises:
      ConfigError: the directory cannot be made.
    """
    content = {
        "config": _settings(config),
        "versions": compatibility.versions(),
        "device": device(),
        "commit": commit(),
        **results,
    }
    make_directory("out", path.parent)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return content


def device() -> dict[str, Any]:
    """The devices that JAX uses, and the CPU that drives them."""
    first = jax.devices()[0]
    described = {
        "platform": first.platform,
        "device_kind": first.device_kind,
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
        "cpu_model": _cpu_model(),
    }
    memory = (first.memory_stats() or {}).get("bytes_limit")  # None on CPUs
    return described | ({"memory_bytes": memory} if memory else {})


def commit() -> str | None:
    """The commit that is checked out, with "+" if files differ from it; None outside a clone.

    Results do not count: those of one study are written before the next one runs.
    """
    here = Path(__file__).parent
    try:
        name = _git("rev-parse", "--short", "HEAD", cwd=here)
        changed = _git("status", "--porcelain", "--", ":/", ":!results", cwd=here)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("+" if changed else "")


def _settings(config: Any) -> dict[str, Any]:
    """The options but `out`: where a result lies decides nothing, and may be a private path."""
    fields = dataclasses.asdict(config)
    fields.pop("out", None)
    return {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), None)


def _git(*arguments: str, cwd: Path) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()
