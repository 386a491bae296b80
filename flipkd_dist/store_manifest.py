"""`manifest.json` of a store's folder: which shards and which index each specification's readers use."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flipkd_dist.durable import whole_file
from flipkd_dist.store_index import damaged
from flipkd_dist.store_shards import StoreSpec

MANIFEST = "manifest.json"
FORMAT = 1
# One specification's: {"spec": ..., "num_vectors": m, "index": ..., "shards": [{"name":, "bytes":, "rows":}, ...]}
Entry = dict[str, Any]


def read_entries(folder: Path) -> dict[str, Entry]:
    """What is published, by the key of its specification; nothing where there is no manifest.

    Raises:
        UserError: the manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a table")
        if content.get("format_version") != FORMAT:
            return {}  # an older layout: its shards are looked at one by one
        return {key: _checked(key, entry) for key, entry in content["stores"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise damaged(path, "is damaged") from None


def _checked(key: str, entry: Entry) -> Entry:
    """The entry, if it has every part and its specification is the one it is filed under."""
    if StoreSpec(**entry["spec"]).key != key:
        raise ValueError("a specification under another's key")
    for shard in entry["shards"]:
        shard["name"], shard["bytes"] + shard["rows"]
    entry["index"]["id"] + "", sum(entry["index"][name] for name in ("num_keys", "num_rows", "words"))
    return entry


def write_entries(folder: Path, entries: dict[str, Entry]) -> None:
    """
    Raises:
        UserError: the disk is full.
    """
    text = json.dumps({"format_version": FORMAT, "stores": entries}, indent=1) + "\n"
    with whole_file(folder / MANIFEST) as file:
        file.write(text.encode())


def new_entry(spec: StoreSpec, shards: list[dict[str, Any]], index: dict[str, Any]) -> Entry:
    return {"spec": asdict(spec), "num_vectors": index["num_keys"], "index": index, "shards": shards}
