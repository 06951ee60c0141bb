"""docs/checkpoints.md: commands are understood, and the names are those of the program."""

import re
import shlex

import pytest
from documents import page
from places import ROOT

from dlm_jax import evaluate, generate, models
from dlm_jax.models import kinds

PAGE = page("docs/checkpoints.md")
COMMANDS = [line for block in PAGE.blocks for line in block.text.splitlines()]
PARSERS = {"dlm_jax.generate": generate.parse, "dlm_jax.evaluate": evaluate.parse}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    python, *argv = shlex.split(command)
    assert python == "python" and "my-lora" in argv
    if argv[0] == "-m":
        assert str(PARSERS[argv[1]](argv[2:]).adapter) == "my-lora"
    else:
        source = (ROOT / argv[0]).read_text()
        assert all(f'"{word}"' in source for word in argv if word.startswith("--"))


def test_what_opens_is_what_is_there():
    architectures = [cells[0].strip("`") for cells in PAGE.table("What opens", "`architectures`")]
    assert architectures == [family.ARCHITECTURE for family in models.FAMILIES.values()]
    told = PAGE.section("What opens")
    for kind in kinds.PUBLIC:
        for name in re.split(" or ", kind.name):
            assert name in told, name
