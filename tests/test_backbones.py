"""Dual encoders: preprocessing as PIL does it, features as transformers gives them, the same after saving."""

from __future__ import annotations

import pytest
import torch
from open_clip.transform import image_transform
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flowrl.reward_models.backbones import ClipBackbone, as_tensor, cosine, per_frame, resized
from flowrl.reward_models.base import to_pil
from flowrl.tiny.models import make_tokenizer

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def backbone(size: int = 32, resize: str = "crop") -> ClipBackbone:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**tower, "image_size": size, "patch_size": 8},
        projection_dim=24,
    )
    return ClipBackbone(CLIPModel(config), tokenizer, MEAN, STD, resize).requires_grad_(False)


def photo(n: int = 2, height: int = 80, width: int = 120) -> torch.Tensor:
    """Smooth colour with some texture, 8 bits deep."""
    g = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(n, 3, 6, 8, generator=g), (height, width), mode="bicubic")
    return ((smooth + 0.1 * torch.rand(n, 3, height, width, generator=g)).clamp(0, 1) * 255).round() / 255


@pytest.mark.parametrize("size", [(512, 512), (300, 455), (455, 301), (80, 120), (224, 224), (97, 640)])
def test_pixels_as_the_processors_make_them(size):
    """The crop of transformers, on both of its backends; the padding and squashing of open_clip; at the size that CLIP sees."""
    images = photo(1, *size)
    (picture,) = to_pil(images)
    raw = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3, "return_tensors": "pt"}
    theirs = {
        "pad": image_transform(224, False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="longest")(picture)[None],
        "squash": image_transform(224, False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="squash")(picture)[None],
    }
    crops = [kind()(picture, **raw)["pixel_values"] for kind in (CLIPImageProcessor, CLIPImageProcessorPil)]
    for resize, expected in [*theirs.items(), *(("crop", crop) for crop in crops)]:
        off = 255 * (resized(images, (224, 224), resize) - expected).abs()
        assert off.max() < 2.5 and off.mean() < 0.35, resize  # PIL rounds to 8 bits in between; up to 2.0 and 0.31 seen


def test_resize_keeps_crops_or_pads():
    wide = torch.zeros(1, 3, 32, 64)
    wide[..., :8] = 1  # on the left edge
    assert resized(wide, (32, 32), "crop").max() == 0  # not seen at all
    padded = resized(wide, (32, 32), "pad")
    assert padded.shape == (1, 3, 32, 32) and padded[..., :3].max() > 0.9 and padded[..., :7, :].max() == 0
    assert resized(wide, (32, 32), "squash")[..., :3].mean() > 0.9


def test_features_are_those_of_transformers():
    clip, images, prompts = backbone(), photo(2, 32, 32), ["a red circle", "two blue squares"]
    out = clip.model(**clip.tokens(prompts), pixel_values=clip.pixels(images))
    ours = torch.stack([cosine(clip.pictures(images), clip.texts([p, p])) for p in prompts], 1) * clip.logit_scale
    torch.testing.assert_close(ours, out.logits_per_image)
    torch.testing.assert_close(clip.texts(prompts[::-1] + prompts)[1:3], clip.texts(prompts)[[0, 0]])


def test_features_as_a_tensor_or_in_an_output():
    plain = torch.ones(2, 3)
    output = BaseModelOutputWithPooling(last_hidden_state=torch.zeros(2, 5, 3), pooler_output=plain)
    assert as_tensor(plain) is plain and as_tensor(output) is plain  # transformers 4, transformers 5


def test_patches_and_words_share_a_space():
    clip = backbone()
    patches = clip.patches(photo(2, 32, 32))
    words, mask = clip.words(["a red circle", "a star"])
    assert clip.grid == (4, 4) and patches.shape == (2, 16, 32) and mask.sum(1).tolist() == [3, 2]
    assert clip.shared(patches, "patches").shape[-1] == clip.shared(words, "words").shape[-1] == clip.dim == 24
    torch.testing.assert_close(clip.patches(photo(2, 32, 32), layer=-2).shape, patches.shape)


def test_gradients_reach_the_picture():
    clip, images = backbone(), photo(1, 48, 40).requires_grad_()
    cosine(clip.pictures(images), clip.texts(["a red circle"])).sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in clip.parameters())


def test_saved_and_loaded(tmp_path):
    clip, images = backbone(), photo(2, 32, 32)
    before = clip.pictures(images)
    clip.save(tmp_path, torch.float32)
    torch.testing.assert_close(clip.pictures(images), before)
    again = ClipBackbone.load(tmp_path)
    torch.testing.assert_close(again.pictures(images), before)
    torch.testing.assert_close(again.texts(["a red ring"]), clip.texts(["a red ring"]))
    with pytest.raises(ValueError, match="no weights at"):
        ClipBackbone.load(tmp_path / "elsewhere")


def test_clips_frame_by_frame():
    clip, video = backbone(), photo(6, 32, 32).unflatten(0, (2, 3))
    torch.testing.assert_close(per_frame(clip.pictures, video)[1, 2], clip.pictures(video[1, 2:])[0])
