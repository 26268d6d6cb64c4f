"""The pretrained parts: Stable Diffusion, CLIP, Mask2Former and the language model.

Every part is a preset's, a Hugging Face hub id or a local folder, and all three are read by the same code.

    sd = load_stable_diffusion("stable-diffusion-v1-5/stable-diffusion-v1-5", device)
    clip = load_clip(preset("sd15").clip, device)
"""

from backbone.command import (
    COLUMNS,
    PATIENCE,
    check_numbers,
    choose_kernels,
    hide_progress_bars,
    markdown,
    new_parser,
    one_line_errors,
    pick_device,
)
from backbone.editor import SAMPLING, Parts, check_fit, load_editor, load_parts
from backbone.folders import (
    FOLDERS,
    HERE,
    BackboneError,
    check_parts,
    clear_errors,
    find_folder,
    find_part,
    fingerprint,
    fingerprint_of,
    lasting_name,
    local_folder,
)
from backbone.latents import (
    SAMPLERS,
    cut_off,
    decode_latents,
    encode_images,
    encode_text,
    new_sampler,
    prediction_target,
    sampler_step,
    set_timesteps,
    vae_factor,
)
from backbone.loading import (
    StableDiffusion,
    check_model,
    load_clip,
    load_clip_tokenizer,
    load_llm,
    load_segmenter,
    load_stable_diffusion,
)
from backbone.presets import PRESETS, Preset, data_folder, preset
