"""docs/rewards.md and docs/serving.md: every block of code runs, every recipe loads, every command is one."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from flowrl.cli import build_parser
from flowrl.config import load_recipe
from flowrl.reward_models.base import embedded_folder, load_rewards
from flowrl.train.rewards.loop import load_reward_recipe, load_task

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("rewards", "serving")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The words of every `flowrl ...`, of blocks and of sentences, but for forms with a word in place of something."""
    text = (DOCS / f"{page}.md").read_text()
    lines = [line for block in blocks(page, "") for line in block.splitlines()] + re.findall(r"`(flowrl [^`]+)`", text)
    told = [shlex.split(line.replace("\n", " "), comments=True)[1:] for line in lines if line.startswith("flowrl ")]
    return [words for words in told if len(words) > 1 and not {"...", "NAME", "DIR", "FILE", "--help"} & {*words}]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as the pages have it: modules of their blocks, a trained reward, the token."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("REWARD_TOKEN", "correct-horse")
    for module, page in (("my_module", "rewards"), ("my_rewards", "serving")):
        own = [block for block in blocks(page, "python") if "def redness" in block or "class " in block]
        (tmp_path / f"{module}.py").write_text("\n".join(own))
        monkeypatch.delitem(sys.modules, module, raising=False)
    shutil.copytree(embedded_folder("tiny_preference"), tmp_path / "runs" / "my-reward")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page, place, capsys):
    namespace: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, f"{page}.md", "exec"), namespace)
    assert ("| artifact | pictures | share |" in capsys.readouterr().out) == (page == "rewards")


def test_recipes_load(place):
    """With a small model in place of those whose weights are not here; of others, until their weights are asked for."""
    sections = [yaml.safe_load(block.replace("pickscore", "tiny_clip")) for page in PAGES for block in blocks(page, "yaml")]
    seen = []
    for section in sections:
        for label, value in section.get("rewards", {}).items():
            try:
                seen += load_rewards({label: value})
            except ValueError as error:
                if "is not here and cannot be fetched" not in str(error):
                    raise
        if "task" in section:
            load_task(load_reward_recipe(section).task)
    assert {"mine", "my-reward", "held_back", "real", "careful", "won", "remote", "sharp"} <= set(seen)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_commands(page, place):
    """The parser takes them, the recipes take their options, and rewards that they name are there."""
    parser = build_parser()
    told = commands(page)
    assert len(told) >= 2
    for words in told:
        arguments = parser.parse_args(words)
        if words[0] == "train":
            section = load_recipe(arguments.recipe, arguments.overrides).rewards
            load_rewards({label: value for label, value in section.items() if label != "runs/tiny_preference"})
        elif words[0] == "train-reward" and arguments.recipe and not arguments.recipe.endswith(".yaml"):
            load_task(load_reward_recipe(arguments.recipe, arguments.overrides).task)
