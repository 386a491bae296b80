"""Which programs the files of cluster/ call in our images, and whether the Dockerfile installs them by name."""

import re
import shlex
import tomllib
from collections.abc import Iterator

from place_checks import ROOT, instructions

DOCKERFILES = {"flipkd": "Dockerfile", "flipkd-mlflow": "mlflow.Dockerfile"}  # by the image's name
# The package that brings a program or a database driver; "." is the package of this repository.
BROUGHT_BY = {
    **{name: name for name in ("rsync", "wget", "curl", "ray", "mlflow")},
    **{"ssh": "openssh-clients", "flipkd": ".", "psycopg2": "psycopg2-binary", "python": "python", "pip": "python"},
}
ALWAYS_THERE = {"bash", "sh", "cat", "export", "set", ".", "ulimit"}  # the shell, its own commands, coreutils
RAY_UP = {"bash", "rsync", "ssh"}  # files go into the container by rsync; the head's container reaches workers by ssh
KUBERAY = {"bash", "ray"}


def programs(command: str) -> set[str]:
    """The first word of every command of a line for the shell."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, ""
    found, starts = set(), True
    for word in lexer:
        if {*word} <= {*";&|"}:
            starts = True
        elif starts and word != "exec" and not re.match(r"\w+=", word):
            found.add(word)
            starts = False
    return found


def _of_list(command: list[str]) -> set[str]:
    """Of a list as containers take it, with the driver of a database's address in it."""
    words = [word for word in command if word not in ("CMD", "CMD-SHELL")]
    script = words[2] if words[1:2] == ["-c"] and words[0] in ("sh", "bash") else ""
    return {*words[:1], *programs(script), *re.findall(r"\w\+(\w+)://", " ".join(words))}


def _of_container(container: dict) -> set[str]:
    """What is started in it, and what its probes call."""
    lists = [container.get("command", []), container.get("healthcheck", {}).get("test", [])]
    lists += [
        probe.get("exec", {}).get("command", []) for key, probe in container.items() if key.endswith("Probe") and probe
    ]
    return {program for one in lists for program in _of_list(one)}


def calls(document: dict) -> Iterator[tuple[str, str]]:
    """(Dockerfile, program) of a manifest, a compose file or a launcher's configuration."""
    if "rayVersion" in document:
        yield from (("Dockerfile", program) for program in KUBERAY)
    if "entrypoint" in document and "rayClusterSpec" in document:
        yield from (("Dockerfile", program) for program in programs(document["entrypoint"]))
    if "docker" in document:
        inside = [key for key in document if key.endswith("commands") and key != "initialization_commands"]
        called = {program for key in inside for command in document[key] for program in programs(command)}
        yield from (("Dockerfile", program) for program in called | RAY_UP)
    ours = re.search(r"([^/]+):[^/]*$", document["image"]) if isinstance(document.get("image"), str) else None
    name = DOCKERFILES.get(ours.group(1)) if ours else None
    if "build" in document:
        name = document["build"]["dockerfile"].rsplit("/", 1)[-1]
    if name:
        yield from ((name, program) for program in _of_container(document))
    for value in document.values():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from calls(inner)


def installed(dockerfile: str) -> set[str]:
    """Packages that a Dockerfile installs by name; with "." those that the package depends on."""
    found = set()
    for name, said in instructions(dockerfile):
        if name == "FROM" and said.startswith("python:"):
            found.add("python")
        for line in re.split(r"&&|;", said) if name == "RUN" else []:
            if match := re.search(r"\b(?:dnf|pip|apt-get) install (.*)", line):
                words = shlex.split(match.group(1))
                values = {words[n + 1] for n, word in enumerate(words[:-1]) if word == "--constraint"}
                found |= {re.split(r"[\[=<>]", word)[0] for word in words if word[0] != "-" and word not in values}
    if any(re.fullmatch(r"python3\.\d+", name) for name in found):
        found.add("python")
    if "." in found:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        found |= {re.match(r"[\w.-]+", one).group() for one in project["dependencies"]}
    return found


def missing(dockerfile: str, called: set[str]) -> list[str]:
    """What is called and neither there in every image nor installed by name."""
    there = installed(dockerfile)
    return [
        f"{program}: called, and the image does not install {BROUGHT_BY.get(program, 'it')}"
        for program in sorted(called - ALWAYS_THERE)
        if BROUGHT_BY.get(program) not in there
    ]
