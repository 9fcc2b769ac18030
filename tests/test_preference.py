"""Preference rewards on small checkpoints in the published layouts, against computations that share nothing with ours.

The golden scores go through PIL, the processors of transformers, open_clip and torchvision, and the networks' own forward.
"""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

import open_clip
import pytest
import torch
import torchvision
from open_clip.transform import image_transform
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    CLIPImageProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import weights
from flowrl.reward_models.backbones import ClipBackbone
from flowrl.reward_models.base import load_reward, to_pil
from flowrl.reward_models.image_reward import ImageReward
from flowrl.reward_models.preference import (
    HPS,
    PICKSCORE,
    Aesthetic,
    ClipScore,
    HPSv2,
    PickScore,
    PreferenceModel,
    PreferenceNetwork,
)
from flowrl.reward_models.texts import TextMemory
from flowrl.tiny.models import make_tokenizer
from tests.test_backbones import backbone, photo

PROMPTS = ["a red circle", "two blue squares and a star"]
ARCHITECTURE = "flowrl-test-vit"


def samples(images: Tensor, prompts: list[str] = PROMPTS) -> Samples:
    n = len(images)
    return Samples([Prompt(p) for p in prompts[:n]], list(range(n)), torch.arange(n), torch.zeros(n, 1), images)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP with all its files."""
    folder = tmp_path_factory.mktemp("clip")
    backbone().save(folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory) -> Path:
    """A small ViT of open_clip; its weights under `state_dict` beside what a trainer leaves there, as HPSv2 was published."""
    configs, folder = tmp_path_factory.mktemp("open_clip"), tmp_path_factory.mktemp("hps")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (configs / f"{ARCHITECTURE}.json").write_text(json.dumps(config))
    open_clip.add_model_config(configs)
    torch.manual_seed(1)
    state = open_clip.create_model(ARCHITECTURE).state_dict()
    torch.save({"epoch": 1, "name": "hps", "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    return folder


def blip_state(width: int = 64, layers: int = 2, patch: int = 8, size: int = 32, vocabulary: int = 12) -> dict[str, Tensor]:
    """Random weights under the names that ImageReward.pt has, the unused projections among them."""
    g = torch.Generator().manual_seed(2)
    text = 128  # unlike the width of the vision tower, as in BLIP-L
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int, scale: float = 0.08) -> None:
        state[name] = scale * torch.randn(*shape, generator=g)

    def linear(name: str, n_in: int, n_out: int, scale: float = 0.08) -> None:
        put(f"{name}.weight", n_out, n_in, scale=scale)
        put(f"{name}.bias", n_out)

    def norm(name: str, n: int) -> None:
        put(f"{name}.weight", n)
        state[f"{name}.weight"] += 1
        put(f"{name}.bias", n)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    put(f"{v}.cls_token", 1, 1, width)
    put(f"{v}.pos_embed", 1, (size // patch) ** 2 + 1, width)
    put(f"{v}.patch_embed.proj.weight", width, 3, patch, patch)
    put(f"{v}.patch_embed.proj.bias", width)
    for i in range(layers):
        norm(f"{v}.blocks.{i}.norm1", width)
        norm(f"{v}.blocks.{i}.norm2", width)
        linear(f"{v}.blocks.{i}.attn.qkv", width, 3 * width)
        linear(f"{v}.blocks.{i}.attn.proj", width, width)
        linear(f"{v}.blocks.{i}.mlp.fc1", width, 4 * width)
        linear(f"{v}.blocks.{i}.mlp.fc2", 4 * width, width)
    norm(f"{v}.norm", width)
    state[f"{t}.embeddings.position_ids"] = torch.arange(48)[None]
    put(f"{t}.embeddings.word_embeddings.weight", vocabulary, text, scale=1)
    put(f"{t}.embeddings.position_embeddings.weight", 48, text)
    norm(f"{t}.embeddings.LayerNorm", text)
    for i in range(layers):
        at = f"{t}.encoder.layer.{i}"
        for kind, source in (("attention", text), ("crossattention", width)):
            linear(f"{at}.{kind}.self.query", text, text)
            linear(f"{at}.{kind}.self.key", source, text)
            linear(f"{at}.{kind}.self.value", source, text)
            linear(f"{at}.{kind}.output.dense", text, text)
            norm(f"{at}.{kind}.output.LayerNorm", text)
        linear(f"{at}.intermediate.dense", text, 2 * text)
        linear(f"{at}.output.dense", 2 * text, text)
        norm(f"{at}.output.LayerNorm", text)
    linear("blip.vision_proj", width, 16)
    linear("blip.text_proj", text, 16)
    stack("mlp.", text, linear)
    return state


def stack(prefix: str, width: int, linear) -> None:
    """The linear head of ImageReward and of LAION's predictor, with the gaps that dropouts leave in its names."""
    sizes = (width, 1024, 128, 64, 16, 1)
    for i, name in enumerate((0, 2, 4, 6, 7)):
        linear(f"{prefix}layers.{name}", sizes[i], sizes[i + 1], scale=sizes[i] ** -0.5)


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(blip_state(), folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "blue", "squares", "star"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head_file(tmp_path_factory) -> Path:
    state: dict[str, Tensor] = {}
    g = torch.Generator().manual_seed(3)

    def linear(name: str, n_in: int, n_out: int, scale: float) -> None:
        state[f"{name}.weight"] = scale * torch.randn(n_out, n_in, generator=g)
        state[f"{name}.bias"] = torch.randn(n_out, generator=g)

    stack("", 24, linear)
    torch.save(state, path := tmp_path_factory.mktemp("aesthetic") / "sac+logos+ava1-l14-linearMSE.pth")
    return path


# ------------------------------------------------------------------------------------------------ golden values


def golden_clip(folder: Path, images: Tensor) -> tuple[Tensor, float]:
    """Logits of picture i with prompt i by transformers alone, and its scale."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
    inputs = processor(text=PROMPTS, images=to_pil(images), padding="max_length", return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits_per_image.diagonal(), float(model.logit_scale.exp())


@pytest.mark.parametrize("size", [(32, 32), (80, 120), (77, 51)])
def test_clip_score_and_pickscore(clip_folder, tmp_path, size):
    images = photo(2, *size)
    logits, scale = golden_clip(clip_folder, images)
    tolerance = {"rtol": 0, "atol": 1e-6 if size == (32, 32) else 1e-3}  # PIL rounds a resized picture to 8 bits; 6e-4 seen
    torch.testing.assert_close(ClipScore(clip_folder)(samples(images)), logits / scale, **tolerance)
    AutoModel.from_pretrained(clip_folder).save_pretrained(tmp_path)  # PickScore came without a tokenizer
    pick = PickScore(tmp_path, processor=clip_folder)(samples(images))
    torch.testing.assert_close(pick, logits / 26, rtol=0, atol=tolerance["atol"] * scale / 26)


@pytest.mark.parametrize(("mode", "resample"), [("bicubic", 3), ("bilinear", 2)])  # SigLIP's, SigLIP 2's
def test_clip_score_with_siglip(tmp_path, mode, resample):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = make_tokenizer()
    vision = {**tower, "image_size": 32, "patch_size": 8}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    processor = SiglipImageProcessor(size={"height": 32, "width": 32}, resample=resample)
    for part in (model, processor, tokenizer):
        part.save_pretrained(tmp_path)
    images = photo(2, 40, 60)
    with torch.no_grad():
        ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt")["input_ids"]  # its padding is read: no mask
        logits = model(input_ids=ids, **processor(to_pil(images), return_tensors="pt")).logits_per_image.diagonal()
    reward = ClipScore(tmp_path)
    assert reward.encoder.resize == "squash" and reward.encoder.mode == mode
    golden = (logits - model.logit_bias) / model.logit_scale.exp()
    torch.testing.assert_close(reward(samples(images)), golden, rtol=0, atol=2e-3)
    reward.encoder.save(tmp_path / "again", torch.float32)
    torch.testing.assert_close(ClipScore(tmp_path / "again")(samples(images)), reward(samples(images)))


@pytest.mark.parametrize("size", [(32, 32), (80, 120), (77, 51)])
def test_hps(hps_folder, size):
    images = photo(2, *size)
    model = open_clip.create_model(ARCHITECTURE).eval()
    model.load_state_dict(torch.load(hps_folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"])
    transform = image_transform(32, is_train=False, resize_mode="longest")
    with torch.no_grad():
        pictures = model.encode_image(torch.stack([transform(picture) for picture in to_pil(images)]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(ARCHITECTURE)(PROMPTS), normalize=True)
    reward = HPSv2(model=hps_folder, architecture=ARCHITECTURE)
    torch.testing.assert_close(reward(samples(images)), (pictures * texts).sum(1), rtol=0, atol=1e-3)
    assert reward.traits.licence == "see model card" and "Apache" in HPS["2.1"].licence


def test_aesthetic(clip_folder, head_file):
    images = photo(2, 32, 32)
    logits = CLIPImageProcessor.from_pretrained(clip_folder)(to_pil(images), return_tensors="pt")
    with torch.no_grad():
        model = AutoModel.from_pretrained(clip_folder)
        x = model.visual_projection(model.vision_model(**logits).pooler_output)
    x = x / x.norm(dim=-1, keepdim=True)
    head = torch.load(head_file, weights_only=True)
    for name in ("0", "2", "4", "6", "7"):
        x = x @ head[f"layers.{name}.weight"].T + head[f"layers.{name}.bias"]
    torch.testing.assert_close(Aesthetic(head_file, clip_folder)(samples(images)), x[:, 0], rtol=1e-4, atol=1e-4)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the last two axes, head by head."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    scores = split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(-2)


def golden_image_reward(state: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """ImageReward written straight from the BLIP paper over the published names."""

    def lin(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(pixels, state[f"{v}.patch_embed.proj.weight"], state[f"{v}.patch_embed.proj.bias"], stride=8)
    x = torch.cat([state[f"{v}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], 1) + state[f"{v}.pos_embed"]
    for i in range(2):
        at = f"{v}.blocks.{i}"
        x = x + lin(attend(*lin(norm(x, f"{at}.norm1", 1e-6), f"{at}.attn.qkv").chunk(3, -1), heads=1), f"{at}.attn.proj")
        x = x + lin(F.gelu(lin(norm(x, f"{at}.norm2", 1e-6), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
    seen = norm(x, f"{v}.norm", 1e-6)
    e = f"{t}.embeddings"
    y = state[f"{e}.word_embeddings.weight"][ids] + state[f"{e}.position_embeddings.weight"][: ids.shape[1]]
    y = norm(y, f"{e}.LayerNorm", 1e-12)
    for i in range(2):
        at = f"{t}.encoder.layer.{i}"
        for kind in ("attention", "crossattention"):
            source, hidden = (y, mask) if kind == "attention" else (seen, None)
            here = f"{at}.{kind}"
            q, k, w = lin(y, f"{here}.self.query"), lin(source, f"{here}.self.key"), lin(source, f"{here}.self.value")
            y = norm(y + lin(attend(q, k, w, 2, hidden), f"{here}.output.dense"), f"{here}.output.LayerNorm", 1e-12)
        inner = lin(F.gelu(lin(y, f"{at}.intermediate.dense")), f"{at}.output.dense")
        y = norm(y + inner, f"{at}.output.LayerNorm", 1e-12)
    y = y[:, 0]
    for name in (0, 2, 4, 6, 7):
        y = lin(y, f"mlp.layers.{name}")
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize("size", [(32, 32), (77, 51)])
def test_image_reward(blip_folder, size):
    images = photo(2, *size)
    T = torchvision.transforms
    transform = T.Compose(
        [
            T.Resize(32, T.InterpolationMode.BICUBIC),
            T.CenterCrop(32),
            T.ToTensor(),
            T.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(blip_folder)
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    pixels = torch.stack([transform(picture) for picture in to_pil(images)])
    golden = golden_image_reward(blip_state(), pixels, tokens["input_ids"], tokens["attention_mask"])
    reward = ImageReward(blip_folder)
    torch.testing.assert_close(reward(samples(images)), golden, rtol=0, atol=1e-5 if size == (32, 32) else 2e-3)
    assert (golden[0] - golden[1]).abs() > 0.01 and (reward(samples(images.flip(0))) - golden).abs().min() > 0.01


# ------------------------------------------------------------------------------------------------ behaviour


@pytest.fixture
def every(clip_folder, hps_folder, blip_folder, head_file, tmp_path) -> dict:
    torch.manual_seed(4)
    network = PreferenceNetwork(backbone(), "gaussian", hidden=16)
    torch.nn.init.normal_(network.mlp[-1].weight)
    network.save(tmp_path / "mine", licence="Apache-2.0")
    return {
        "clip_score": ClipScore(clip_folder),
        "pickscore": PickScore(clip_folder),
        "hpsv2": HPSv2(model=hps_folder, architecture=ARCHITECTURE),
        "image_reward": ImageReward(blip_folder),
        "aesthetic": Aesthetic(head_file, clip_folder),
        "mine": load_reward(str(tmp_path / "mine")),
    }


def test_a_step_along_the_gradient_raises_the_score(every):
    for name, reward in every.items():
        assert reward.name == name and reward.traits.differentiable
        images = photo(2, 40, 56).requires_grad_()
        before = reward(samples(images))
        (gradient,) = torch.autograd.grad(before.sum(), images)
        with torch.no_grad():
            after = reward(samples(images + 0.2 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]))
        assert (after > before).all(), name


def test_clips_are_scored_by_frame(every):
    clip = photo(6, 32, 32).unflatten(0, (2, 3))
    for name, reward in every.items():
        with torch.no_grad():
            frames = torch.stack([reward(samples(clip[:, f])) for f in range(3)], dim=1)
            torch.testing.assert_close(reward(samples(clip)), frames.mean(1), msg=lambda m, name=name: f"{name}: {m}")
            reward.frames = "min"
            torch.testing.assert_close(reward(samples(clip)), frames.amin(1))
            reward.frames = "softmin"
            weights = (-frames / frames.std(1, unbiased=False, keepdim=True)).softmax(1)
            torch.testing.assert_close(reward(samples(clip)), (weights * frames).sum(1), rtol=1e-3, atol=1e-5)


def test_a_still_clip_scores_as_its_picture(every):
    still = photo(2, 32, 32)[:, None].expand(-1, 4, -1, -1, -1)
    for reward in every.values():
        for frames in ("mean", "min", "softmin"):
            reward.frames = frames
            torch.testing.assert_close(reward(samples(still)), reward(samples(still[:, 0])), rtol=1e-4, atol=1e-6)


def test_who_sees_the_edge_of_a_wide_picture(clip_folder, hps_folder, blip_folder):
    plain = photo(1, 32, 96)
    edge = plain.clone()
    edge[..., :24] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    for reward in (PickScore(clip_folder), ImageReward(blip_folder)):
        assert torch.equal(reward(samples(plain)), reward(samples(edge)))
    hps = HPSv2(model=hps_folder, architecture=ARCHITECTURE)
    assert (hps(samples(plain)) - hps(samples(edge))).abs() > 1e-3


def test_cut_prompts_are_counted_and_told_once(every, caplog):
    long = "a " * 100
    for name, reward in every.items():
        if name == "aesthetic":  # reads no prompt
            continue
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for prompts in (PROMPTS[:1] * 2, [PROMPTS[0], long + name], ["a", long]):
                reward(samples(photo(2, 32, 32), prompts))
        warnings = [record.getMessage() for record in caplog.records if "tokens of a prompt" in record.getMessage()]
        assert len(warnings) == 1 and f"reward {name} reads" in warnings[0] and "1 of the 2 prompts" in warnings[0]
        assert reward.truncated == 0.5  # the red circle, both long ones, and "a"


def test_prompts_are_encoded_once_and_outlive_inference_mode():
    asked = []

    def encode(prompts: list[str]) -> Tensor:
        asked.append(prompts)
        return torch.tensor([[float(len(p))] for p in prompts])

    memory, cpu = TextMemory(encode, keep=2), torch.device("cpu")
    with torch.inference_mode():
        assert memory(["a", "bb", "a"], cpu).tolist() == [[1], [2], [1]]
    weight = torch.ones(1, requires_grad=True)
    (memory(["bb"], cpu) * weight).sum().backward()  # an inference tensor would refuse
    memory(["ccc", "a"], cpu)
    memory(["a"], cpu)
    assert asked == [["a", "bb"], ["ccc"], ["a"]]  # a was the oldest of three


def test_our_own_models_as_saved(tmp_path):
    images, prompts = photo(2, 32, 32), PROMPTS
    for head in ("cos", "linear", "gaussian"):
        torch.manual_seed(0)
        network = PreferenceNetwork(backbone(), head, hidden=16)
        if head != "cos":
            assert not network(images, prompts).any()  # indifferent at first
            torch.nn.init.normal_(network.mlp[-1].weight)
        folder = tmp_path / head
        network.save(folder, options={"frames": "min"}, trained_on="nothing")
        values, reward = network(images, prompts).detach(), load_reward(str(folder))
        assert reward.name == head and reward.frames == "min"
        expected = values if values.ndim == 1 else values[:, 0]
        torch.testing.assert_close(reward(samples(images)), expected, rtol=1e-2, atol=1e-2)  # saved in half precision
    doubtful = PreferenceModel(folder, kappa=2.0)
    mean, std = doubtful.distribution(samples(images)).T
    torch.testing.assert_close(doubtful(samples(images)), mean - 2 * std)
    torch.testing.assert_close(std.log(), values[:, 1], rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="wants a gaussian head"):
        PreferenceModel(tmp_path / "cos", kappa=1.0)
    with pytest.raises(ValueError, match="choose cos, linear or gaussian"):
        PreferenceNetwork(backbone(), "quadratic")


def test_gradients_reach_what_is_trained():
    network = PreferenceNetwork(backbone().requires_grad_(True), "cos")
    network(photo(2, 32, 32), PROMPTS).sum().backward()
    assert network.backbone.model.logit_scale.grad.abs() > 0
    assert network.backbone.model.text_projection.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------ what can be wrong


def test_incomplete_checkpoints_are_named(clip_folder, hps_folder, blip_folder, head_file, tmp_path):
    def without(path: Path, name: str, under: str | None = None) -> Path:
        state = torch.load(path, weights_only=True)
        del (state[under] if under else state)[name]
        torch.save(state, tmp_path / path.name)
        return tmp_path / path.name

    with pytest.raises(ValueError, match=r"lacks 1 of \d+ weights: visual.proj$"):
        HPSv2(model=without(hps_folder / "HPS_v2.1_compressed.pt", "visual.proj", "state_dict"), architecture=ARCHITECTURE)
    name = "blip.visual_encoder.blocks.1.attn.qkv.bias"
    with pytest.raises(ValueError, match=f"lacks 1 of .* {name}"):
        ImageReward(without(blip_folder / "ImageReward.pt", name), tokenizer=blip_folder)
    with pytest.raises(ValueError, match=r"is no ImageReward checkpoint: it lacks blip.visual_encoder.pos_embed"):
        ImageReward(head_file, tokenizer=blip_folder)
    with pytest.raises(ValueError, match=r"lacks 1 of 10 weights: layers.7.bias"):
        Aesthetic(without(head_file, "layers.7.bias"), clip_folder)
    torch.save({**torch.load(head_file, weights_only=True), "layers.0.weight": torch.zeros(1024, 768)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"layers.0.weight has the shape \(1024, 768\) instead of \(1024, 24\)"):
        Aesthetic(tmp_path / "other.pth", clip_folder)
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="is no checkpoint of tensors"):
        HPSv2(model=tmp_path / "broken.pt", architecture=ARCHITECTURE)


def test_a_clip_without_all_its_weights_is_refused(clip_folder, tmp_path):
    model = AutoModel.from_pretrained(clip_folder)
    state = {name: value for name, value in model.state_dict().items() if name != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks 1 weights of a CLIPModel: visual_projection.weight"):
        PickScore(tmp_path, processor=clip_folder)


def test_weights_that_are_not_here(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("clip_score", "pickscore", "hpsv2", "image_reward", "aesthetic"):
        with pytest.raises(ValueError, match=r"is not here and cannot be fetched; .* `hf download \S+/\S+ --local-dir FOLDER`"):
            load_reward(name)
    with pytest.raises(ValueError, match="no weights at"):
        HPSv2(model=tmp_path)
    with pytest.raises(ValueError, match=f"no tokenizer.* {PICKSCORE.processor}"):
        backbone().model.save_pretrained(tmp_path)
        PickScore(tmp_path)
    with pytest.raises(ValueError, match=r"version=3: choose 2.0 or 2.1"):
        load_reward("hpsv2 version=3")
    with pytest.raises(ValueError, match="no architecture"):
        HPSv2(model=tmp_path, architecture="ViT-XS")
    with pytest.raises(ValueError, match="choose mean, min or softmin"):
        load_reward("clip_score", model=saved(tmp_path), frames="max")


def test_a_hub_that_has_no_address_is_not_asked_for_a_minute(monkeypatch):
    """The hub's client would, five times with growing waits; a proxy finds the address for us."""

    def away(host, port):
        asked.append((host, port))
        raise socket.gaierror(-2, "Name or service not known")

    asked: list[tuple] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", away)
    monkeypatch.setattr("flowrl.reward_models.weights.getproxies", lambda: {"https": "http://proxy"})
    weights._notice_absence.cache_clear()
    assert weights.located("a/b") == "a/b" and not asked
    monkeypatch.setattr("flowrl.reward_models.weights.getproxies", dict)
    weights._notice_absence.cache_clear()
    assert weights.located(Path("/tmp")) == "/tmp" and not asked
    with pytest.raises(ValueError, match="PickScore_v1 is not here and cannot be fetched; .* `hf download"):
        load_reward("pickscore")
    assert asked == [("huggingface.co", "https")]
    weights._notice_absence.cache_clear()


def saved(folder: Path) -> Path:
    ClipBackbone.save(backbone(), folder)
    return folder
