"""Tiny real diffusers pipelines, built offline with random weights, for the tests.

Every component is the class the released model uses (no stand-ins), only small, so whatever works here meets the
same code paths as the real thing: packed latents, dynamic shifts, multistep solvers, three text encoders.

    pipe = tiny("sd3")
    image = pipe(prompt="a red circle", num_inference_steps=2, output_type="pt", **CALL["sd3"]).images

`CALL[name]` has classifier-free guidance off; `{**CALL[name], **GUIDED[name]}` has it on. A picture is 32 x 32 (a clip
has 5 frames); video pipelines answer in `.frames`. Same `seed`, same weights, whatever else drew random numbers.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 printable stand-ins of byte-level BPE

# What Stable Diffusion ships, including the keys its own scheduler class does not take: `from_config` keeps those,
# and they decide what another scheduler made from this config does (DDIM clips its samples unless told not to).
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


def start_picture(colour: str) -> Image.Image:
    """What an image-to-video pipeline starts from: a square of a colour on white, off the middle."""
    picture = Image.new("RGB", (40, 40), "white")
    picture.paste(colour, (4, 10, 24, 30))
    return picture


SMALL: dict[str, Any] = {"height": 32, "width": 32}
CALL: dict[str, dict[str, Any]] = {
    "sd15": {**SMALL, "guidance_scale": 1.0},
    "sdxl": {**SMALL, "guidance_scale": 1.0},
    "sd3": {**SMALL, "guidance_scale": 1.0, "max_sequence_length": 32},
    # FLUX feeds guidance_scale to the model as an input; only true_cfg_scale makes a second pass.
    "flux": {**SMALL, "guidance_scale": 3.5, "true_cfg_scale": 1.0, "max_sequence_length": 32},
    "qwenimage": {**SMALL, "true_cfg_scale": 1.0, "max_sequence_length": 64},
    "wan": {**SMALL, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 32},
    "wan_i2v": {**SMALL, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 32, "image": start_picture("teal")},
    "ltx": {**SMALL, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 32},
    # Its guidance_scale is an input of the model, as FLUX has it. The template of its prompts is hundreds of letters long.
    "hunyuan": {
        **SMALL,
        "num_frames": 5,
        "guidance_scale": 6.0,
        "max_sequence_length": 32,
        "prompt_template": {"template": "{}", "crop_start": 0},
    },
    "cogvideox": {**SMALL, "num_frames": 9, "guidance_scale": 1.0, "max_sequence_length": 32},
}
GUIDED: dict[str, dict[str, Any]] = {
    "sd15": {"guidance_scale": 5.0},
    "sdxl": {"guidance_scale": 5.0},
    "sd3": {"guidance_scale": 5.0},
    "flux": {"true_cfg_scale": 4.0, "negative_prompt": "blurry"},
    "qwenimage": {"true_cfg_scale": 4.0, "negative_prompt": "blurry"},
    "wan": {"guidance_scale": 5.0},
    "wan_i2v": {"guidance_scale": 5.0},
    "ltx": {"guidance_scale": 5.0},
    "hunyuan": {"true_cfg_scale": 4.0, "negative_prompt": "blurry"},
    "cogvideox": {"guidance_scale": 5.0},
}


def tiny(name: str, seed: int = 0, **options: Any) -> diffusers.DiffusionPipeline:
    """The pipeline `name` (a key of `BUILDERS`) with random weights decided by `seed`, in eval mode, on the CPU.

    `tiny("sd15", prediction="v")` gives one whose scheduler reads the model's output as a velocity.
    The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        pipe = BUILDERS[name](seed, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reload(directory: str | Path) -> diffusers.DiffusionPipeline:
    """`from_pretrained` for a saved tiny pipeline, with its weights where a bit-exact comparison needs them.

    Weights come out of a safetensors file at addresses that no allocator would choose, and a CPU matmul's last bits
    depend on alignment (FLUX: 6e-7 in the picture). Copying them makes the two pipelines equal to the bit.
    """
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.clone()
    return pipe


def _seeded(seed: int, build: Callable[..., Any], *args: Any, gain: float = 1.0, **kwargs: Any) -> Any:
    """Build one module under its own seed, so that no module's weights depend on what was built before it.

    `gain` multiplies its matrices. As initialised, a denoiser barely heeds the prompt or the timestep (a few percent
    of its output), and a video decoder barely heeds its latents; with somewhat larger weights all of them matter.
    """
    torch.manual_seed(seed)
    module = build(*args, **kwargs).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
    return module


def _clip(seed: int, suffix: str = "", projection: bool = False, **config: Any) -> dict[str, Any]:
    """A byte-level CLIP tokenizer and a CLIP text tower, as the components `tokenizer...` and `text_encoder...`."""
    tokens = [*BYTES, *(b + "</w>" for b in BYTES), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    # vocab_file/merges_file are accepted and silently ignored by transformers 5; vocab/merges are not.
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    shape: dict[str, Any] = {"hidden_size": 32, "projection_dim": 32, "intermediate_size": 37, "num_attention_heads": 4}
    special: dict[str, Any] = {"vocab_size": len(vocab), "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text = transformers.CLIPTextConfig(**shape, **special, num_hidden_layers=2, **config)
    tower = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": _seeded(seed, tower, text)}


def _t5(seed: int, suffix: str = "", kind: str = "T5", width: int = 32) -> dict[str, Any]:
    """A tokenizer that reads characters, and a T5 (or UMT5) encoder."""
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *string.printable])}
    reader = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    reader.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    reader.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(vocab), d_model=width, d_ff=37, d_kv=8, num_layers=1, num_heads=4
    )
    encoder = _seeded(seed, getattr(transformers, f"{kind}EncoderModel"), config)
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}


def _qwen(seed: int) -> dict[str, Any]:
    """A byte-level Qwen tokenizer and a Qwen2.5-VL of width 16.

    The pipeline wraps the prompt in a template and drops its first 34 tokens, so every word of that template is one
    token here too: otherwise most of the template would stay in and push the prompt out.
    """
    spaced = "the image by detailing color shape size texture quantity text spatial relationships of objects and"
    words = [*("Ġ" + word for word in spaced.split()), "Ġbackground", "Describe", "system", "user", "assistant"]
    merges: Any = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*BYTES, *dict.fromkeys(a + b for a, b in merges), *special])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=special[1:])
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16}
    text = {**shape, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"vocab_size": len(vocab), "bos_token_id": None, "eos_token_id": vocab["<|im_end|>"]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}}
    vision = {**shape, "depth": 1, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder = _seeded(seed, transformers.Qwen2_5_VLForConditionalGeneration, config)
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def _image_vae(seed: int, **config: Any) -> diffusers.AutoencoderKL:
    """The VAE of Stable Diffusion and FLUX, with 4 latent channels at half the picture's side."""
    return _seeded(
        seed,
        diffusers.AutoencoderKL,
        sample_size=32,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        **config,
    )


def _unet(seed: int, **config: Any) -> diffusers.UNet2DConditionModel:
    """The UNet of Stable Diffusion with two blocks, the inner one with attention."""
    return _seeded(
        seed,
        diffusers.UNet2DConditionModel,
        gain=3.0,
        sample_size=16,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        **config,
    )


def _sd15(seed: int, prediction: str = "epsilon") -> diffusers.StableDiffusionPipeline:
    prediction_type = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    return diffusers.StableDiffusionPipeline(
        **_clip(seed),
        unet=_unet(seed, cross_attention_dim=32, attention_head_dim=2),
        vae=_image_vae(seed, scaling_factor=0.18215),
        scheduler=diffusers.PNDMScheduler.from_config({**STABLE_DIFFUSION, "prediction_type": prediction_type}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(seed: int) -> diffusers.StableDiffusionXLPipeline:
    unet = _unet(
        seed,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return diffusers.StableDiffusionXLPipeline(
        **_clip(seed),
        **_clip(seed + 1, "_2", projection=True, hidden_act="gelu"),
        unet=unet,
        vae=_image_vae(seed, scaling_factor=0.13025),
        scheduler=diffusers.EulerDiscreteScheduler.from_config({**STABLE_DIFFUSION, "timestep_spacing": "leading"}),
    )


def _sd3(seed: int) -> diffusers.StableDiffusion3Pipeline:
    transformer = _seeded(
        seed,
        diffusers.SD3Transformer2DModel,
        gain=2.0,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=80,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        **_clip(seed, projection=True),
        **_clip(seed + 1, "_2", projection=True, hidden_act="gelu"),
        **_t5(seed, "_3", width=80),  # wider than the two CLIPs together, which are padded up to it
        transformer=transformer,
        vae=_image_vae(seed, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(seed: int) -> diffusers.FluxPipeline:
    transformer = _seeded(
        seed,
        diffusers.FluxTransformer2DModel,
        gain=2.0,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        **_clip(seed),
        **_t5(seed, "_2"),
        transformer=transformer,
        vae=_image_vae(seed, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def _qwenimage(seed: int) -> diffusers.QwenImagePipeline:
    transformer = _seeded(
        seed,
        diffusers.QwenImageTransformer2DModel,
        gain=2.0,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = _seeded(
        seed,
        diffusers.AutoencoderKLQwenImage,
        gain=1.5,
        base_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
    )
    return diffusers.QwenImagePipeline(**_qwen(seed), transformer=transformer, vae=vae, scheduler=scheduler)


def _wan(seed: int) -> diffusers.WanPipeline:
    transformer = _seeded(
        seed,
        diffusers.WanTransformer3DModel,
        gain=2.0,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = _seeded(seed, diffusers.AutoencoderKLWan, gain=1.3, base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.WanPipeline(**_t5(seed, kind="UMT5"), transformer=transformer, vae=vae, scheduler=scheduler)


def _wan_i2v(seed: int) -> diffusers.WanImageToVideoPipeline:
    """Wan 2.1's: latents, a mask and the encoded picture side by side, 16 + 4 + 16 channels, and the picture's CLIP states."""
    transformer = _seeded(
        seed,
        diffusers.WanTransformer3DModel,
        gain=2.0,
        in_channels=36,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=16,
        added_kv_proj_dim=24,
    )
    shape: dict[str, Any] = {"hidden_size": 16, "projection_dim": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**shape, num_hidden_layers=2, image_size=32, patch_size=8)
    size = {"height": 32, "width": 32}
    return diffusers.WanImageToVideoPipeline(
        **_t5(seed, kind="UMT5"),
        transformer=transformer,
        vae=_seeded(seed, diffusers.AutoencoderKLWan, gain=1.3, base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        image_encoder=_seeded(seed, transformers.CLIPVisionModel, vision, gain=2.0),
        image_processor=transformers.CLIPImageProcessor(crop_size=size, size={"shortest_edge": 32}),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def _ltx(seed: int) -> diffusers.LTXPipeline:
    transformer = _seeded(
        seed,
        diffusers.LTXVideoTransformer3DModel,
        gain=2.0,
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    vae = _seeded(
        seed,
        diffusers.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return diffusers.LTXPipeline(**_t5(seed), transformer=transformer, vae=vae, scheduler=scheduler)


def _hunyuan(seed: int) -> diffusers.HunyuanVideoPipeline:
    transformer = _seeded(
        seed,
        diffusers.HunyuanVideoTransformer3DModel,
        gain=2.0,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4),
    )
    vae = _seeded(
        seed,
        diffusers.AutoencoderKLHunyuanVideo,
        gain=1.5,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    tokenizer = _t5(seed)["tokenizer"]
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(vocab_size=len(tokenizer), **size, max_position_embeddings=512, pad_token_id=0)
    return diffusers.HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=_seeded(seed, transformers.LlamaModel, llama),
        **_clip(seed + 1, "_2"),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _cogvideox(seed: int, snr_shift_scale: float = 3.0) -> diffusers.CogVideoXPipeline:
    """v-prediction, on noise levels that are moved and end in pure noise."""
    transformer = _seeded(
        seed,
        diffusers.CogVideoXTransformer3DModel,
        gain=2.0,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=32,
    )
    vae = _seeded(
        seed,
        diffusers.AutoencoderKLCogVideoX,
        gain=1.5,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift_scale,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return diffusers.CogVideoXPipeline(**_t5(seed), transformer=transformer, vae=vae, scheduler=scheduler)


BUILDERS: dict[str, Callable[..., Any]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "qwenimage": _qwenimage,
    "wan": _wan,
    "wan_i2v": _wan_i2v,
    "ltx": _ltx,
    "hunyuan": _hunyuan,
    "cogvideox": _cogvideox,
}
DENOISER: dict[str, str] = {name: "unet" if name in ("sd15", "sdxl") else "transformer" for name in BUILDERS}
