"""Trains the yes-token reward: cross-entropy of yes or no, and Bradley-Terry on the yes-to-no gap (RewardDance, 2509.08826).

    pointwise    the picture that shows the prompt: yes; one that does not, or that people liked less: no
    reference    (worse, better): yes; (better, worse): no

Without a model of the user's, a thumbnail of a vision language model is built here: the embedded encoder's eyes and a small Llama
that reads the grammar of the embedded world.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowrl.config import ConfigError
from flowrl.data import sample_seed
from flowrl.pairs import PreferencePair, load_pairs, load_picture
from flowrl.reward_models.artifact import encoder
from flowrl.reward_models.base import REWARD_FILE
from flowrl.reward_models.generative import ANSWERS, QUESTION, REFERENCE_QUESTION, VisionLanguage, asked, yes_loss
from flowrl.tiny import KINDS, all_specs
from flowrl.tiny.pairs import captioned_scenes, drawn_tests, word_tests
from flowrl.train.rewards.artifact import auc
from flowrl.train.rewards.loop import RewardRecipe, Score, picks, positions
from flowrl.train.rewards.losses import accuracy_within, wins

#: A turn is its pictures, its words, and a mark where the answer begins.
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %} <answer>"
)


def tiny_vision_language(backbone: str, width: int, layers: int, questions: list[str]) -> VisionLanguage:
    """A Llava of thumbnail size: the eyes of a dual encoder, an untrained Llama, a tokenizer of the grammar's words."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import (
        CLIPImageProcessor,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    texts = [*(spec["prompt"] for spec in all_specs()), *questions, *ANSWERS]
    words = sorted({word for text in texts for word in re.findall(r"[a-z]+|[.?]", text.lower())})
    special = ["<pad>", "<unk>", "<image>", "<answer>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, *words])}, "<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>", "<answer>"]
    )
    eyes = encoder(backbone)
    vision = eyes.model.config.vision_config
    side = vision.image_size
    text = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    image = fast.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(eyes.model.vision_model.state_dict())
    pictures = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=eyes.mean.flatten().tolist(),
        image_std=eyes.std.flatten().tolist(),
    )
    processor = LlavaProcessor(
        pictures,
        fast,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    return VisionLanguage(model, processor)


@dataclass
class Generative:
    """Options of the task `generative`."""

    model: str | None = None  #: A vision language model, folder or hub id; by default a thumbnail of one is built.
    data: str = (
        "scenes"  #: `scenes` of the embedded world with right and wrong captions, or preference pairs: a file or a folder.
    )
    eval_data: str | None = None  #: Held-out preference pairs; for `scenes` they are drawn.
    reference: bool = False  #: Ask which of two pictures is better, instead of whether one shows the prompt.
    question: str | None = None  #: With {prompt} in it; by default as the reward asks.
    bradley_terry: float = 0.5  #: Weight of the Bradley-Terry loss beside the cross-entropy.
    #: Weight of the language model's loss on the words of the question where the answer is yes: captioning, by which a model
    #: that has never seen a picture learns what words look like. For one that is built here; 0 for a trained one.
    caption_weight: float = 0.0
    lora_rank: int = 0  #: Train a LoRA of this rank on the attention projections (merged when saved); 0 trains all weights.
    train_vision: bool = False  #: Train the vision tower too.
    backbone: str = "tiny_clip"  #: Eyes of the model that is built.
    width: int = 96  #: Of the language model that is built, a multiple of 32.
    layers: int = 3  #: Of the language model that is built.

    def prepare(self, recipe: RewardRecipe, device: torch.device) -> nn.Module:
        if recipe.batch_size % 2:
            raise ConfigError(f"batch_size={recipe.batch_size}: must be even, for each yes there is a no")
        if self.data == "scenes" and self.reference:
            raise ConfigError("task.reference compares pictures: give preference pairs as task.data")
        if self.data != "scenes" and self.eval_data is None:
            raise ConfigError("task.eval_data: name the held-out preference pairs")
        self.recipe, self.device = recipe, device
        self.asked = self.question or (REFERENCE_QUESTION if self.reference else QUESTION)
        if self.model is None:
            network = tiny_vision_language(self.backbone, self.width, self.layers, [QUESTION, REFERENCE_QUESTION, self.asked])
        else:
            network = VisionLanguage.load(self.model)
        if self.lora_rank:
            from peft import LoraConfig, get_peft_model

            targets = "^(?!.*vision).*(q_proj|k_proj|v_proj|o_proj)$" if not self.train_vision else ["q_proj", "k_proj", "v_proj"]
            network.model = get_peft_model(network.model, LoraConfig(r=self.lora_rank, target_modules=targets))
        elif not self.train_vision:
            for name, parameter in network.model.named_parameters():
                parameter.requires_grad_("vision_tower" not in name and "visual." not in name)
        self.network = network.to(device)
        if self.data == "scenes":
            images, right, wrong = word_tests(40, seed=recipe.seed + 1)
            self.tests = torch.from_numpy(images), [s["prompt"] for s in right], [s["prompt"] for s in wrong]
            self.drawn = drawn_tests(4)
        else:
            self.pairs, self.test_pairs = (_strict(load_pairs(source)) for source in (self.data, str(self.eval_data)))
        return self.network

    def batch(self, step: int) -> tuple[list[Tensor], list[str], Tensor]:
        """Pictures, questions and answers; yes and no of one question in turn."""
        where = positions(self.recipe)
        if self.data != "scenes":
            chosen = picks(len(self.pairs), self.recipe, step)[: len(where) // 2]
            return self._asked([self.pairs[i] for i in chosen])
        images, specs, shown = captioned_scenes(len(where) // 2, sample_seed(self.recipe.seed, step, where.start))
        wrong = [_not_shown(shown, i) for i in range(len(specs))]
        pictures = np.stack([images, images[wrong]], 1).reshape(-1, *images.shape[1:])
        questions = [asked(self.asked, spec["prompt"]) for spec in specs for _ in range(2)]
        return [torch.from_numpy(pictures)], questions, torch.tensor([True, False]).repeat(len(specs))

    def _asked(self, pairs: list[PreferencePair]) -> tuple[list[Tensor], list[str], Tensor]:
        """The questions that preference pairs make, whose first picture is the better one. Their pictures have one size."""
        better = torch.stack([load_picture(pair.first) for pair in pairs])
        worse = torch.stack([load_picture(pair.second) for pair in pairs])
        in_turn = [torch.stack(order, 1).flatten(0, 1) for order in ((better, worse), (worse, better))]
        questions = [asked(self.asked, pair.prompt) for pair in pairs for _ in range(2)]
        return in_turn[::-1] if self.reference else in_turn[:1], questions, torch.tensor([True, False]).repeat(len(pairs))

    def loss(self, batch: tuple[list[Tensor], list[str], Tensor]) -> tuple[Tensor, dict[str, float]]:
        images, questions, yes = batch
        pictures, captioned = [x.to(self.device) for x in images], self.caption_weight > 0
        log_probs, words = self.network.read(pictures, questions, words=captioned)
        values, accuracy = yes_loss(self.network, log_probs, yes.to(self.device), self.bradley_terry)
        if words is None:
            return values, {"accuracy": float(accuracy)}
        caption = -words[yes.to(self.device)].mean()
        return values + self.caption_weight * caption, {"accuracy": float(accuracy), "caption": float(caption.detach())}

    def _gaps(self, images: list[Tensor], questions: list[str]) -> Tensor:
        rows = torch.arange(len(questions)).split(60)
        parts = [
            self.network.gap([load_picture(x[r]).to(self.device) for x in images], [questions[i] for i in r]).cpu() for r in rows
        ]
        return torch.cat(parts)

    def evaluate(self) -> dict[str, Score]:
        """Of yes and no: accuracy; of a yes and a no that belong together: how often the yes has the larger gap, in `pairs`."""
        if self.data != "scenes":
            images, questions, yes = self._asked(self.test_pairs)
            gaps = self._gaps(images, questions)
            return {"accuracy": Score.mean((gaps > 0) == yes), "pairs": Score.mean(wins(gaps[::2] - gaps[1::2]))}
        pictures, right, wrong = self.tests
        says = [self._gaps([pictures], [asked(self.asked, prompt) for prompt in prompts]) for prompts in (right, wrong)]
        won = wins(says[0] - says[1])
        result = {"accuracy": Score.mean(torch.cat([says[0] > 0, says[1] < 0])), "pairs": Score.mean(won)}
        for kind, part in zip(KINDS, won.chunk(len(KINDS)), strict=True):
            result[f"pairs/{kind}"] = Score.mean(part)
        prompts, drawn, strict = self.drawn
        questions = [asked(self.asked, prompt) for prompt in prompts for _ in range(drawn.shape[1])]
        gaps = self._gaps([drawn.flatten(0, 1)], questions)
        result["samples/auc"] = Score(auc(gaps, strict.flatten()), len(questions))
        result["samples/pairs"] = Score(*accuracy_within(gaps.view(strict.shape), strict))
        return result

    def save(self, folder: Path) -> None:
        network = self.network
        if self.lora_rank:
            network = copy.deepcopy(network)
            network.model = network.model.merge_and_unload()
        network.save(folder)
        options: dict[str, Any] = {"reference": True} if self.reference else {}
        if self.question:
            options["question"] = self.question
        (folder / REWARD_FILE).write_text(json.dumps({"reward": "yes_token", "options": options}, indent=2) + "\n")

    def describe(self) -> str:
        kind = "whether the second picture is better than the first" if self.reference else "whether the picture shows the prompt"
        lines = [f"The chance that a vision language model answers yes when asked {kind}:\n\n> {self.asked}\n"]
        if self.model is None:
            lines.append(
                f"Its eyes are those of `{self.backbone}`; the language model is a Llama of {self.layers} layers of width"
                f" {self.width}, trained from nothing, whose words are the grammar of the embedded world.\n"
            )
        else:
            lines.append(f"Trained from `{self.model}`.\n")
        if self.data == "scenes":
            lines.append(
                "Trained on drawn scenes with their captions, and with captions one word away that they do not show. Held out,"
                " on 240 scenes of test captions: `accuracy`, and `pairs`, how often the right caption is likelier than the wrong"
                " one. On 480 samples of `tiny-sd3` for test captions, against the exact reader: `samples/pairs`, how often the"
                " right one of two samples of a caption is likelier, and `samples/auc`, the same of samples of any captions, in"
                " which even a model that sees nothing may exceed 0.5, as some captions are easier to draw than others."
            )
        else:
            lines.append(f"Trained on the preference pairs of `{self.data}`, held out: `{self.eval_data}`.")
        return "\n".join(lines)


def _not_shown(shown: np.ndarray, i: int) -> int:
    """A picture that does not show caption i: the one of the caption one word away, or else the next."""
    others = [i ^ 1, *range(i + 1, len(shown)), *range(i)]
    return next(j for j in others if j < len(shown) and not shown[j, i])


def _strict(pairs: list[PreferencePair]) -> list[PreferencePair]:
    """Without ties, the better picture first."""
    kept = [pair for pair in pairs if pair.label != 0.5]
    if not kept:
        raise ConfigError("task.data: all pairs are ties")
    return [p if p.label > 0.5 else PreferencePair(p.prompt, p.second, p.first, 1 - p.label, p.weight) for p in kept]
