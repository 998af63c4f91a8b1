"""``meshctl lab``: what it says to the mistakes of people who know kubectl."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from meshctl_py.__main__ import main
from meshctl_py.commands import lab as commands
from meshctl_py.lab import home
from meshctl_py.lab.home import LabHome


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabHome:
    """A lab of which only the logs are looked at."""
    home = LabHome("here", tmp_path)
    home.logs.mkdir()
    for name in ("istiod", "ztunnel-n1", "shop_server_web", "shop_server_echo", "outside_caller_shell"):
        (home.logs / f"{name}.log").write_text(f"log of {name}\n")
    monkeypatch.setattr(commands, "choose_lab", lambda name: home)
    return home


def logs(*arguments: str) -> str:
    return CliRunner().invoke(main, ["lab", "logs", *arguments]).output


def test_an_option_of_the_command_is_told_from_one_of_ours(running: LabHome) -> None:
    result = CliRunner().invoke(main, ["lab", "exec", "client", "-n", "shop", "curl", "-s", "http://server.shop/"])
    assert result.exit_code == 2
    assert "No such option '-s'" in result.output
    assert "'--' goes before COMMAND" in result.output


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(
    ("arguments", "log"),
    [
        (("n1",), "ztunnel-n1"),
        (("istiod",), "istiod"),
        (("caller",), "outside_caller_shell"),
        (("server", "-c", "web"), "shop_server_web"),
        (("shop/server/echo",), "shop_server_echo"),
    ],
)
def test_a_log_is_found_by_the_names_that_status_shows(arguments: tuple[str, ...], log: str) -> None:
    assert logs(*arguments) == f"log of {log}\n"


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("server",), "server has several logs, choose with -n and -c: shop/server/echo, shop/server/web"),
        (("server", "-c", "wbe"), "there is no log of server in container wbe (there are: istiod,"),
        (("caller", "-n", "shop"), "there is no log of caller in namespace shop (there are: istiod,"),
        (("n7",), "there is no log of n7 (there are: istiod,"),
    ],
)
def test_a_log_that_is_not_found_is_refused_with_where_it_was_looked_for(arguments: tuple[str, ...], message: str) -> None:
    assert message in logs(*arguments)


@pytest.mark.parametrize("flag", ["--name", "--lab"])
def test_a_lab_is_chosen_by_the_flag_of_the_other_commands_too(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "own_labs", lambda: tmp_path)
    result = CliRunner().invoke(main, ["lab", "status", flag, "nope"])
    assert (result.exit_code, result.output) == (1, "Error: no lab named nope is running\n")
