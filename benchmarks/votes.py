"""Does the loop close? Blind votes in the gallery -> preference pairs -> DPO -> a model that agrees with those votes.

    python benchmarks/votes.py                      1,758 votes, then the command that the page names; seeds 0 1 2

The voter is simulated: the exact verifier looks at the two pictures that the page shows, knows nothing else of them, and presses
the key of the better one by its dense score, or the tie's. The page is the real one, in the machine's own Chromium; the pairs are
the file that it exports; training is the command that it prints, with a seed. Held-out prompts then answer three questions:

  error      of two pictures of the untrained model: does the model now denoise the one that the voter prefers with less error?
             (base: the same question to the untrained model)
  implicit   ... does DPO's own reward, the change of that error against the base, prefer it? (chance: 0.5)
  wins       of a picture before and after training, from the same noise: which one does the voter prefer? (a tie is half)

95 % intervals by a bootstrap over prompts. Everything stays under --out and is not done twice.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import torch
from playwright.sync_api import Page, sync_playwright

from flowrl.cli import main as flowrl
from flowrl.commands.common import quiet_libraries
from flowrl.data import load_prompts
from flowrl.evaluate import Protocol, compare_wins, evaluate, text_table
from flowrl.pairs import load_pairs, load_picture
from flowrl.policy import Policy
from flowrl.record import load_trained
from flowrl.reward_models import load_reward
from flowrl.statistics import interval
from flowrl.tiny import split, verify

MODEL, REWARD = "tiny-sd3", "tiny_dense"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
TIMES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  #: At which errors are compared ...
NOISES = 4  #: ... each with so many noises, the same for both pictures.
SHOWN = "['left', 'right'].map(side => new URL(document.querySelector(`#${side} img`).getAttribute('src'), location).pathname)"


def gallery(prompts: str, seeds: int, out: Path) -> Path:
    """Two or more pictures of each prompt by the untrained model: what is voted on."""
    if not (out / "index.html").is_file():
        count = len(split(prompts.removeprefix("tiny-")))
        flowrl(["gallery", MODEL, "--prompts", prompts, "--limit", str(count), "--seeds", str(seeds), "--out", str(out)])
    return out


class Voter:
    """The exact verifier, as one who looks at pictures. Knows captions as specs."""

    def __init__(self) -> None:
        self.specs = {spec["prompt"]: spec for name in ("train", "test") for spec in split(name)}
        self.seen: dict[tuple[str, str], float] = {}

    def score(self, file: str, prompt: str) -> float:
        if (file, prompt) not in self.seen:
            self.seen[file, prompt] = float(verify(load_picture(Path(file)).unsqueeze(0), [self.specs[prompt]])[1])
        return self.seen[file, prompt]

    def key(self, prompt: str, left: str, right: str) -> str:
        a, b = self.score(left, prompt), self.score(right, prompt)
        return "ArrowDown" if a == b else "ArrowLeft" if a > b else "ArrowRight"

    def vote(self, page: Page, votes: int) -> int:
        """Vote until `votes` are cast or no pair is left. Returns how many."""
        for cast in range(votes):
            if not page.locator("#duel").is_visible():
                return cast
            left, right = page.evaluate(SHOWN)
            page.keyboard.press(self.key(page.locator("#vote-prompt").inner_text(), left, right))
        return votes


def voted(folder: Path, votes: int) -> tuple[Path, str]:
    """Vote on a gallery in a browser. Returns the exported pairs and the command that the page names for them."""
    file = folder.with_name(f"{folder.name}.jsonl")
    note = file.with_suffix(".command")
    if not note.is_file():
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
            page = browser.new_page()
            page.goto(f"file://{(folder / 'index.html').resolve()}#view=vote")
            cast = Voter().vote(page, votes)
            with page.expect_download() as started:
                page.locator("#download").click()
            started.value.save_as(file)
            note.write_text(page.locator("#command-train").inner_text() + "\n")
            print(f"{folder.name}: {cast} votes cast in the browser", flush=True)
            browser.close()
    return file, note.read_text().strip()


def trained(command: str, file: Path, seed: int, out: Path) -> Path:
    """Run the page's own command, with its file where it lies, a seed and a folder."""
    folder = out / f"voted-{seed}"
    if not (folder / "README.md").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        words = [word for word in shlex.split(command)[1:] if not word.startswith(("data=", "output_dir="))]
        flowrl([*words, f"data={file}", f"output_dir={folder}", f"seed={seed}", "eval_steps=0", "report_to=none"])
    return folder


@torch.no_grad()
def errors(policy: Policy, file: Path) -> tuple[np.ndarray, list[str]]:
    """(pairs, 2, draws) denoising errors of the preferred picture and of the other one, and the prompts. Ties are left out."""
    pairs = [pair for pair in load_pairs(file) if pair.label != 0.5]
    ordered = [(p.first, p.second) if p.label > 0.5 else (p.second, p.first) for p in pairs]
    shown = {source: pair.prompt for pair, sources in zip(pairs, ordered, strict=True) for source in sources}
    row, texts = {source: i for i, source in enumerate(shown)}, list(shown.values())
    named = list(dict.fromkeys(texts))
    group = torch.tensor([named.index(text) for text in texts])
    x0 = policy.latents_of(torch.stack([load_picture(source) for source in shown])).float()
    columns = []
    for draw in range(len(TIMES) * NOISES):
        rng = torch.Generator().manual_seed(draw)
        t = torch.full((len(x0),), TIMES[draw % len(TIMES)])
        noise = torch.randn(len(named), *x0.shape[1:], generator=rng)[group]  # one for all pictures of a prompt
        time = t.reshape(-1, 1, 1, 1)
        x = (1 - time) * x0 + time * noise
        v = torch.cat([policy.velocity(texts[i : i + 96], x[i : i + 96], t[i : i + 96]).float() for i in range(0, len(x), 96)])
        columns.append((v - (noise - x0)).square().flatten(1).mean(1))
    both = torch.tensor([[row[source] for source in sources] for sources in ordered])
    return torch.stack(columns, 1)[both].numpy(), [pair.prompt for pair in pairs]


def agreement(value: np.ndarray, prompts: list[str]) -> str:
    """How often the preferred picture has the higher value, with interval. value: (pairs, 2, draws), the preferred one first."""
    agrees = value.mean(2)[:, 0] > value.mean(2)[:, 1]
    means = np.array([agrees[[other == prompt for other in prompts]].mean() for prompt in dict.fromkeys(prompts)])
    low, high = interval(means)
    return f"{means.mean():.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/votes"))
    arguments = parser.parse_args()
    quiet_libraries()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file, command = voted(gallery("tiny-train", 3, arguments.out / "ballot"), arguments.votes)
    held_out, _ = voted(gallery("tiny-test", 6, arguments.out / "held-out"), 10_000)
    labels = [pair.label for pair in load_pairs(file)]
    print(f"{len(labels)} votes, {sum(label == 0.5 for label in labels)} ties; the page says: {command}", flush=True)

    protocol = Protocol("tiny-test", 20, 1.0, seeds=4)
    prompts, rewards = load_prompts(protocol.prompts), {REWARD: load_reward(REWARD)}
    untrained = load_trained(MODEL)
    before, named = errors(untrained, held_out)
    pictures = evaluate(untrained, prompts, rewards, protocol, name="base", progress=True)
    header = ["", f"error ({len(named)} pairs)", "implicit", f"wins ({len(prompts)} prompts x {protocol.seeds})"]
    rows = [["base", agreement(-before, named), "", ""]]
    for seed in arguments.seeds:
        policy = load_trained(trained(command, file, seed, arguments.out))
        after, _ = errors(policy, held_out)
        wins = compare_wins(pictures, evaluate(policy, prompts, rewards, protocol, name=f"seed {seed}", progress=True), REWARD)
        won = f"{wins.rate:.3f} ({wins.low:.3f} to {wins.high:.3f})"
        rows.append([f"seed {seed}", agreement(-after, named), agreement(before - after, named), won])
        print(text_table(header, rows), flush=True)
    (arguments.out / "results.json").write_text(
        json.dumps([dict(zip(header, row, strict=True)) for row in rows], indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
