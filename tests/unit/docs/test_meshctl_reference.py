"""Every command and option of meshctl is in its reference page, and nothing else is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from meshctl_py.__main__ import main

TEXT = (Path(__file__).parents[3] / "docs/reference/meshctl.md").read_text()


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def documented() -> dict[str, set[str]]:
    """The options of each section, long and short names."""
    sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        heading, _, body = section.partition("\n")
        name = re.match(r"(?:[a-z]+ ?)+(?<! )", heading)
        if name and heading.startswith("meshctl"):
            found[name[0].strip()] = {
                option for line in body.splitlines() if line.startswith("| `-") for option in re.findall(r"`(--?[a-zA-Z][a-z-]*)`", line)
            }
    return found


def test_every_command_and_option_is_documented_and_no_other() -> None:
    built = {
        path: {
            name
            for parameter in command.params
            if isinstance(parameter, click.Option)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        for path, command in commands(main, "meshctl")
    }
    assert documented() == built


def test_every_usage_is_one_line() -> None:
    for path, command in commands(main, "meshctl"):
        usage = command.get_usage(click.Context(command, info_name=path, terminal_width=80))
        assert "\n" not in usage
