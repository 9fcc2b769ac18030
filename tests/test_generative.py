"""The yes-token reward on a Llava of thumbnail size: what it reads off the answer, orders, gradients, training, folders."""

import json

import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.config import ConfigError
from flowrl.reward_models import RewardError, load_reward
from flowrl.reward_models.base import to_pil
from flowrl.reward_models.generative import VisionLanguage, YesToken, asked, one_token, yes_loss
from flowrl.train.rewards.artifact import auc
from flowrl.train.rewards.contrastive import tiny_clip
from flowrl.train.rewards.generative import _not_shown, tiny_vision_language
from flowrl.train.rewards.loop import RewardTrainer, load_reward_recipe

QUESTION = "a red circle?"


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("eyes") / "clip"
    tiny_clip(width=32, layers=1, text_width=32, text_layers=1, dim=16, patch=16).save(folder)
    return folder


@pytest.fixture(scope="module")
def network(eyes) -> VisionLanguage:
    torch.manual_seed(1)
    return tiny_vision_language(str(eyes), width=32, layers=1, questions=[QUESTION]).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "mine"
    network.save(place, torch.float32)
    (place / "reward.json").write_text(json.dumps({"reward": "yes_token", "options": {}}))
    return place


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """In 256 levels, as a file would hold them."""
    return torch.randint(0, 256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(seed)) / 255


def samples(images: torch.Tensor, references: torch.Tensor | None = None) -> Samples:
    n = len(images)
    prompts = [Prompt(text) for text in ["a red circle", "two blue stars", "a cross above a ring"][:n]]
    return Samples(prompts, list(range(n)), torch.arange(n), torch.zeros(n, 1), images, references=references)


def test_answers_are_single_tokens_in_any_spelling(network):
    """The tokenizer of the thumbnail lowers its words: all spellings are one token, and an unknown word is none."""
    ids = {word: network.processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")}
    assert network.answers == ((ids["yes"],), (ids["no"],))
    with pytest.raises(ValueError, match="no single token for 'perhaps'"):
        one_token(network.processor.tokenizer, "perhaps")


def test_the_gap_sums_the_spellings():
    """P(yes) = .1 + .3, P(no) = .2: the gap is log 2, and the reward .4 / .6."""
    made = VisionLanguage.__new__(VisionLanguage)
    torch.nn.Module.__init__(made)
    made.answers = ((0, 2), (1,))
    gap = made.gap_of(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log())
    torch.testing.assert_close(gap.sigmoid(), torch.tensor([2 / 3]))


def test_the_reward_is_the_share_of_yes(folder, network):
    reward = load_reward(folder, question="{prompt}?")
    images = pictures(3)
    log_probs = network([images], [f"{text}?" for text in samples(images).texts])
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3))
    yes, no = (log_probs[:, ids[0]].exp() for ids in network.answers)
    torch.testing.assert_close(reward(samples(images)), yes / (yes + no))
    alone = torch.stack([reward(samples(images).select([i]))[0] for i in range(3)])
    torch.testing.assert_close(reward(samples(images)), alone)  # whatever the padding
    assert reward.traits.range == (0.0, 1.0) and reward.traits.differentiable
    with pytest.raises(RewardError, match="scores pictures"):
        reward(samples(images[:, None]))


def test_tensors_give_what_the_processor_gives(network, monkeypatch):
    images = pictures(2)
    ours = network([images], [QUESTION] * 2)
    with monkeypatch.context() as patched:
        patched.setattr(VisionLanguage, "plain", property(lambda self: False))
        torch.testing.assert_close(network([images], [QUESTION] * 2), ours, atol=1e-5, rtol=1e-5)


def test_the_words_are_scored_as_transformers_scores_a_caption(network):
    images = pictures(1)
    answer, words = network.read([images], [QUESTION], words=True)
    torch.testing.assert_close(answer, network([images], [QUESTION]))
    inputs = network.processor(images=to_pil(images), text=[network._chat(QUESTION, 1)], return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == network.model.config.image_token_id, -100)
    torch.testing.assert_close(-words[0], network.model(**inputs, labels=labels).loss, atol=1e-5, rtol=1e-5)
    _, padded = network.read(
        [pictures(1).repeat(2, 1, 1, 1)], [QUESTION, "a star above a ring, and two blue crosses?"], words=True
    )
    torch.testing.assert_close(padded[0], words[0], atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_pixels(folder):
    reward = load_reward(folder, question="{prompt}?")
    images = pictures(1).requires_grad_()
    reward(samples(images)).sum().backward()
    direction, step = images.grad.sign(), 1e-3
    with torch.no_grad():
        difference = reward(samples(images + step * direction)) - reward(samples(images - step * direction))
    assert float(difference) / (2 * step) == pytest.approx(float(images.grad.abs().sum()), rel=0.05)


def test_references_are_asked_in_both_orders_and_averaged(folder):
    images = pictures(3)
    references = torch.stack([pictures(3, 1), pictures(3, 2)], 1)
    reward = YesToken(folder, question="{prompt}?", reference=True)
    one_way = YesToken(folder, question="{prompt}?", reference=True, both_orders=False)
    assert reward.traits.needs == ("images", "references")

    def asked(first, second):
        return one_way(samples(second, first[:, None]))

    expected = torch.stack([(asked(references[:, r], images) + 1 - asked(images, references[:, r])) / 2 for r in range(2)]).mean(
        0
    )
    torch.testing.assert_close(reward(samples(images, references)), expected)
    # Against itself neither is better, whatever the model thinks of orders.
    torch.testing.assert_close(reward(samples(images, images[:, None])), torch.full((3,), 0.5))
    assert (one_way(samples(images, images[:, None])) - 0.5).abs().max() > 1e-4
    with pytest.raises(RewardError, match="there are none"):
        reward(samples(images))


def test_loss_by_hand():
    """log P(yes), log P(no) of a yes row: log .5, log .25; of its no row: log .2, log .6.

    Cross-entropy (-log .5 - log .6) / 2 = .6020; gaps log 2 and -log 3, so Bradley-Terry log(1 + e^-(log 6)) = log(7/6) = .1542.
    """
    made = VisionLanguage.__new__(VisionLanguage)
    torch.nn.Module.__init__(made)
    made.answers = ((0,), (1,))
    log_probs = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]]).log()
    loss, accuracy = yes_loss(made, log_probs, torch.tensor([True, False]), bradley_terry=2.0)
    assert float(loss) == pytest.approx(0.60199 + 2 * 0.15415, abs=1e-4)
    assert float(accuracy) == 1
    assert float(yes_loss(made, log_probs, torch.tensor([False, True]))[1]) == 0


def test_the_wrong_picture_does_not_show_the_caption():
    """shown[picture, caption]. The neighbour of 0 shows caption 0 too, so the next that does not is taken."""
    shown = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool().numpy()
    assert [_not_shown(shown, i) for i in range(4)] == [2, 0, 3, 2]


def recipe(eyes, out, task=None, **values):
    section = {"name": "generative", "backbone": str(eyes), "width": 32, "layers": 1, **(task or {})}
    base = {"max_steps": 2, "batch_size": 8, "eval_steps": 0, "checkpointing_steps": 0, "report_to": "none"}
    return load_reward_recipe({"task": section, **base, **values, "output_dir": str(out)})


def test_generated_pictures_are_judged_as_the_reward_judges_them(eyes, tmp_path, monkeypatch):
    """They are kept in 8 bits, 0 to 255: their AUC against the exact reader is that of the reward on the same pictures in [0, 1],
    and stands in the table with the number of pictures."""
    kept = torch.randint(0, 256, (2, 4, 3, 64, 64), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    strict = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]])
    prompts = ["a red circle", "two blue stars"]
    monkeypatch.setattr("flowrl.train.rewards.generative.drawn_tests", lambda each: (prompts, kept, strict))
    trainer = RewardTrainer(recipe(eyes, tmp_path / "run", max_steps=1))
    trainer.train()
    value, n = trainer.held_out["samples/auc"]
    each = [Prompt(prompt) for prompt in prompts for _ in range(4)]
    judged = Samples(each, [0] * 8, torch.arange(8), torch.zeros(8, 1), kept.flatten(0, 1) / 255)
    with trainer.averaged():
        trainer.module.eval()
        trainer.module.save(tmp_path / "exact", torch.float32)  # the run's folder holds half precision
    assert (value, n) == (pytest.approx(auc(YesToken(tmp_path / "exact")(judged), strict.flatten())), 8)
    assert trainer.held_out["samples/pairs"].n == 4 + 4  # two right and two wrong pictures of each caption
    assert 0 < value < 1 and trainer.held_out["accuracy"].n == 480 and trainer.held_out["pairs/counting"].n == 40
    assert "| samples/auc         |      8 |" in (tmp_path / "run" / "README.md").read_text()


def files_of_pairs(tmp_path):
    """Bright pictures are better than dark ones."""
    from PIL import Image

    for name, level in (("bright", 230), ("dark", 20)):
        for i in range(4):
            Image.new("RGB", (64, 64), (level + i, level, level)).save(tmp_path / f"{name}{i}.png")
    rows = [{"prompt": "a star", "chosen": f"bright{i}.png", "rejected": f"dark{i}.png"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("task", [{}, {"reference": True}, {"lora_rank": 4}], ids=["point", "reference", "lora"])
def test_training_on_pairs_learns_and_the_folder_says_the_same(eyes, tmp_path, task):
    pairs = files_of_pairs(tmp_path)
    task = {"data": pairs, "eval_data": pairs, **task}
    steps = {"max_steps": 60, "learning_rate": 1e-2, "ema_decay": 0.5}
    trainer = RewardTrainer(recipe(eyes, tmp_path / "run", task, **steps))
    before = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.module.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any("vision_tower" in name for name in moved)
    if task.get("lora_rank"):
        assert all("lora_" in name for name in moved)
    else:
        assert trainer.held_out == {"accuracy": (1.0, 8), "pairs": (1.0, 4)}
    reward = load_reward(tmp_path / "run")
    bright, dark = torch.full((1, 3, 64, 64), 0.9), torch.full((1, 3, 64, 64), 0.08)
    if task.get("reference"):
        assert reward(samples(bright, dark[:, None])) > 0.5 > reward(samples(dark, bright[:, None]))
    else:
        with torch.no_grad(), trainer.averaged():
            trainer.module.eval()
            question = trainer.task.asked.format(prompt="a red circle")
            expected = trainer.module.gap([bright], [question]).sigmoid()
        torch.testing.assert_close(reward(samples(bright)), expected, atol=2e-3, rtol=0)
        assert reward(samples(bright)) > reward(samples(dark))


def test_what_cannot_be_asked_is_refused(eyes, tmp_path):
    for task, message in (
        ({"reference": True}, "task.reference compares pictures"),
        ({"data": "pairs.jsonl"}, "task.eval_data"),
    ):
        with pytest.raises(ConfigError, match=message):
            RewardTrainer(recipe(eyes, tmp_path / "run", task))
    with pytest.raises(ConfigError, match="must be even"):
        RewardTrainer(recipe(eyes, tmp_path / "run", batch_size=7))
    with pytest.raises(ValueError, match="no vision language model"):
        YesToken(tmp_path / "nothing")
    with pytest.raises(ValueError, match="dtype='half': choose float32, bfloat16, float16"):
        YesToken("tiny_yes_token", dtype="half")
    assert asked('Is it {prompt}? Say {"answer": yes or no}.', "a {red} cat") == 'Is it a {red} cat? Say {"answer": yes or no}.'
