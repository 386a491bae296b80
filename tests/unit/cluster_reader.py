"""The files of cluster/, read."""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"


def names() -> list[str]:
    return sorted(path.relative_to(CLUSTER).as_posix() for path in CLUSTER.rglob("*") if path.is_file())


def text(name: str) -> str:
    return (CLUSTER / name).read_text(encoding="utf-8")


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all(text(name)))
