"""What the command line says about itself."""

import pytest
from click.testing import CliRunner

from flipkd_dist.cli import cli

CONFIGURED = {"run", "score", "train", "evaluate", "register", "show"}


def answer(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments, prog_name="flipkd")
    assert result.exit_code == 0, result.output
    return result.output


def test_the_promised_verbs_are_there():
    assert {*CONFIGURED, "predict", "pairs"} <= set(cli.commands)
    overview = answer("--help")
    assert all(f"\n  {verb} " in overview for verb in cli.commands)


@pytest.mark.parametrize("verb", cli.commands)
def test_help_of_a_verb_says_what_it_takes(verb):
    usage, said = answer(verb, "--help").split("\n", 1)
    assert usage.startswith(f"Usage: flipkd {verb} ")
    if verb in CONFIGURED:
        assert usage.endswith("CONFIG [key=value ...]")
    if verb == "predict":
        assert usage.endswith("MODEL") and "models:/NAME@ALIAS" in said
    assert cli.commands[verb].help.split("\n")[0].split(".")[0].split(":")[0] in " ".join(said.split())
    undescribed = [
        one.name for one in cli.commands[verb].params if getattr(one, "opts", [""])[0][:2] == "--" and not one.help
    ]
    assert not undescribed


def test_version():
    assert answer("--version").startswith("flipkd, version ")
