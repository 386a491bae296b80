"""What the command line says about itself, and how it ends."""

import logging
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from flipkd_dist import cli as command_line
from flipkd_dist import promotion
from flipkd_dist.cli import cli
from flipkd_dist.errors import StoppedOnRequest, UserError

CONFIGURED = {"run", "score", "train", "evaluate", "register", "promote", "show", "plan"}


def answer(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments, prog_name="flipkd")
    assert result.exit_code == 0, result.output
    return result.output


def test_the_promised_verbs_are_there():
    others = ["predict", "rank", "embed", "retrieve", "cluster", "export", "pairs", "convert", "store"]
    assert {*CONFIGURED, "teach", "compare", *others} <= set(cli.commands)
    overview = answer("--help")
    assert all(f"\n  {verb} " in overview for verb in cli.commands)


@pytest.mark.parametrize("verb", cli.commands)
def test_help_of_a_verb_says_what_it_takes(verb):
    usage, said = answer(verb, "--help").split("\n", 1)
    assert usage.startswith(f"Usage: flipkd {verb} ")
    if verb in CONFIGURED:
        assert usage.endswith("CONFIG [key=value ...]")
    if verb in ("predict", "rank"):
        assert usage.endswith("MODEL") and "models:/NAME@ALIAS" in said
    assert cli.commands[verb].help.split("\n")[0].split(".")[0].split(":")[0] in " ".join(said.split())
    undescribed = [
        one.name for one in cli.commands[verb].params if getattr(one, "opts", [""])[0][:2] == "--" and not one.help
    ]
    assert not undescribed


def test_register_under_another_alias(monkeypatch):
    found = []
    monkeypatch.setattr(
        command_line, "_pipeline", lambda _, overrides, **__: SimpleNamespace(register=lambda: found.append(overrides))
    )
    answer("register", "x.yaml", "seed=3", "--alias", "challenger")
    answer("register", "x.yaml")
    assert found == [("seed=3", "tracking.alias='challenger'"), ()]


def test_promote_says_what_has_moved(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(promotion, "promote", lambda *arguments: asked.append(arguments[1:]) or ["one", "two"])
    (tmp_path / "x.yaml").write_text("name: x")
    assert answer("promote", str(tmp_path / "x.yaml")) == "one\ntwo\n"
    answer("promote", str(tmp_path / "x.yaml"), "--from", "previous", "--to", "live", "--force")
    assert asked == [("challenger", "champion", False), ("previous", "live", True)]


def test_an_error_shows_no_password(monkeypatch, capsys):
    def fail(**_):
        raise RuntimeError("500 for http://me:hush@there:5000/api")

    monkeypatch.delenv("FLIPKD_DEBUG", raising=False)
    monkeypatch.setattr(command_line, "cli", fail)
    with pytest.raises(SystemExit):
        command_line.main()
    said = capsys.readouterr().err
    assert "http://there:5000/api" in said and "hush" not in said


def test_version():
    assert answer("--version").startswith("flipkd, version ")


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("a.csv:3: wrong:\n  mend it"), 2, "a.csv:3: wrong: mend it"),
        (StoppedOnRequest("stopped at step 5: run again"), 75, "stopped at step 5: run again"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (RuntimeError("rank 1\nfailed"), 1, "RuntimeError: rank 1 failed (FLIPKD_DEBUG=1 shows where)"),
    ],
)
def test_exit_codes_and_one_line(monkeypatch, capsys, error, code, said):
    def fail(**_):
        raise error

    monkeypatch.delenv("FLIPKD_DEBUG", raising=False)
    monkeypatch.setattr(command_line, "cli", fail)
    monkeypatch.setattr(logging.getLogger("flipkd_dist"), "handlers", [])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == code
    assert capsys.readouterr() == ("", f"flipkd: {said}\n")


@pytest.mark.parametrize(
    "command, error, code",
    [
        ("run", OSError(28, "No space left on device", "/runs/x/stages.json"), 75),
        ("evaluate", RuntimeError("(sqlite3.OperationalError) database or disk is full"), 75),
        ("predict", OSError(30, "Read-only file system", "/mnt/answers.jsonl"), 1),
        ("run", RuntimeError("NCCL error: Error while creating shared memory segment: No space left on device"), 1),
        ("train", OSError(28, "No space left on device", "/dev/shm/nccl-x"), 1),
    ],
)
def test_only_storage_of_a_command_that_goes_on_is_worth_another_call(monkeypatch, capsys, command, error, code):
    def fail(**_):
        raise error

    monkeypatch.delenv("FLIPKD_DEBUG", raising=False)
    monkeypatch.setattr(command_line, "cli", fail)
    monkeypatch.setattr("sys.argv", ["flipkd", command, "x.yaml"])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == code and ("run the same command again" in capsys.readouterr().err) == (code == 75)


def test_debugging_shows_where(monkeypatch):
    def fail(**_):
        raise RuntimeError("rank 1")

    monkeypatch.setenv("FLIPKD_DEBUG", "1")
    monkeypatch.setattr(command_line, "cli", fail)
    with pytest.raises(RuntimeError, match="rank 1"):
        command_line.main()
