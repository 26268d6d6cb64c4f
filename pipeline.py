"""InstructGIE as a diffusers pipeline: a picture, and an example pair, or words, or both; the edit they show.

    pipe = InstructGIEPipeline.from_pretrained("runs/train/editor").to("cuda")
    edited = pipe("make it night", image, prompt_pair=(before, after)).images[0]

An edit, in five lines:

    example pair, query -> Img_VPcon = [[before, after], [query, grey]] -> G_ven, once per edit
    instruction l -> U -> l' -> text encoder, once per edit
    noise x_T; for every timestep: RCLDM(x_t, l', condition) -> residuals -> frozen U-Net -> noise prediction,
        guided away from the one made without the instruction, and without the example pair; x_t -> x_(t-1)
    lower right quadrant of x_0 -> VAE decoder -> the answer

This file's order: what goes in, the steps, what comes out; then pictures of any shape, and the model card.
Symbols: B samples; P panel size in pixels, p in latent pixels; C latent channels; K branches of guidance.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import backbone
import liu
from dataset import answer_panel, compose_grid, drop_example, mask_query, split_grid
from pictures import check_finite, image_to_tensor, tensor_to_image, to_rgb
from rcldm import RCLDM
from training.card import SAMPLING, model_card

log = logging.getLogger(__name__)

Picture = Image.Image | np.ndarray | Tensor


@dataclass
class InstructGIEPipelineOutput(BaseOutput):
    """images: the answers, as `output_type` has them. prompts: the instructions, as U has unified them."""

    images: list[Image.Image] | np.ndarray | Tensor
    prompts: list[str]


class InstructGIEPipeline(DiffusionPipeline, StableDiffusionMixin):
    """The frozen Stable Diffusion, the trained RCLDM and the unification module: load once, edit many.

    vae … scheduler: of a Stable Diffusion. rcldm: trained for its U-Net. llm, llm_tokenizer: of the module U;
    None leaves instructions as they stand. panel: P; None takes the RCLDM's own. settings: what `train.py`
    recorded, among it how to sample best. Raises BackboneError where the U-Net, the autoencoder and the RCLDM
    do not fit, and where nothing tells P.
    """

    model_cpu_offload_seq = "llm->text_encoder->vae->unet"
    _exclude_from_cpu_offload: ClassVar = ["rcldm"]  # it works at every step, and by more ways than `forward`
    _optional_components: ClassVar = ["llm", "llm_tokenizer"]
    _callback_tensor_inputs: ClassVar = ["latents", "pred_original_sample", "prompt_embeds", "condition"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        rcldm: RCLDM,
        llm: PreTrainedModel | None = None,
        llm_tokenizer: PreTrainedTokenizerBase | None = None,
        panel: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        mine, theirs = ({**model.config} for model in (rcldm.trainable_copy, unet))
        for name in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
            if json.dumps(mine[name]) != json.dumps(theirs[name]):  # tuples and lists alike
                reason = f"its U-Net has {name} {theirs[name]}, the editor's {mine[name]}"
                raise backbone.BackboneError(f"the editor does not fit this Stable Diffusion: {reason}")
        self.factor = backbone.vae_factor(vae)  # P / p
        if panel is None and rcldm.config.panel is None:
            raise backbone.BackboneError("the RCLDM does not tell its panels' size: give panel=P")
        panel = operator.index(rcldm.config.panel if panel is None else panel)
        if rcldm.config.panel is None:  # so that `components` tell it to another pipeline
            rcldm.register_to_config(panel=panel)
        if rcldm.config.factor != self.factor or panel % self.factor:
            reason = f"the autoencoder's factor is {self.factor}, the editor's {rcldm.config.factor}"
            raise backbone.BackboneError(f"panels of {panel} pixels do not fit: {reason}")
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
        parts |= {"scheduler": scheduler, "rcldm": rcldm, "llm": llm, "llm_tokenizer": llm_tokenizer}
        self.register_modules(**parts)
        self.register_to_config(panel=panel, settings=SAMPLING | (settings or {}))
        self.unifier: liu.InstructionUnifier | None = None
        self._interrupt, self._num_timesteps = False, 0
        self._guidance_scale, self._visual_guidance_scale = 1.0, 1.0

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> InstructGIEPipeline:
        """A folder or hub id: of an editor, as `train.py` saves it, with the pretrained parts that it names;
        or of a whole pipeline, as `save_pretrained` writes it.

        options: diffusers'; for an editor `torch_dtype`, and parts by name that are not to be loaded, among
        them `llm=None`: then the language model stays away, and instructions are used as they stand.
        Only safetensors are read. Raises BackboneError.
        """
        folder = backbone.find_folder(source)
        if (folder / "model_index.json").is_file():
            with backbone.clear_errors(source, "an InstructGIE pipeline's folder", folder):
                backbone.check_parts(folder)
                pipe = super().from_pretrained(folder, **{"use_safetensors": True, **options})
                backbone.check_tokenizer(pipe.tokenizer, pipe.text_encoder)
                if pipe.llm is not None:
                    backbone.check_llm(pipe.llm, pipe.llm_tokenizer)
                for name, part in pipe.components.items():
                    if isinstance(part, nn.Module) and name not in options:
                        backbone.check_model(part)
                        backbone.check_weights(part, folder / name)
            _check_settings(f"{source}: model_index.json", {**pipe.settings, "panel": pipe.panel})
            return pipe
        dtype = options.pop("torch_dtype", None) or options.pop("dtype", None) or torch.float32
        rcldm, settings = backbone.load_editor(folder, dtype=dtype)
        missing = {"stable_diffusion", "llm", "panel"} - set(settings)
        if missing:
            raise backbone.BackboneError(f"{source}: instructgie.json lacks {', '.join(sorted(missing))}")
        _check_settings(f"{source}: instructgie.json", settings)
        wanted = ["stable_diffusion", *(["llm"] if settings["llm"] and "llm" not in options else [])]
        found = {name: backbone.find_part(folder, settings, name) for name in wanted}
        parts = {"rcldm": rcldm, "llm": None, "llm_tokenizer": None}
        parts |= backbone.load_stable_diffusion(found["stable_diffusion"], dtype=dtype)._asdict()
        if "llm" in found:
            parts["llm"], parts["llm_tokenizer"] = backbone.load_llm(found["llm"], dtype=dtype)
        return cls(**{**parts, **options}, panel=settings["panel"], settings=settings)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """The whole pipeline, its pretrained parts too, and a model card where there is none."""
        super().save_pretrained(save_directory, **options)
        card = Path(save_directory) / "README.md"
        if not card.exists():
            card.write_text(model_card(self.settings), encoding="utf-8")

    def _upload_folder(self, working_dir: str | Path, *args: Any, **options: Any) -> Any:
        """What `push_to_hub` ends in: our card goes in the place of the form that diffusers leaves blank."""
        card = Path(working_dir) / "README.md"
        if "[More Information Needed]" in card.read_text(encoding="utf-8"):
            card.write_text(model_card(self.settings), encoding="utf-8")
        return super()._upload_folder(working_dir, *args, **options)

    @property
    def panel(self) -> int:
        return self.config.panel

    @property
    def settings(self) -> dict[str, Any]:
        """What `train.py` recorded of the training, and `SAMPLING`'s names: how to sample unless told."""
        return self.config.settings

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set by a callback (`pipe._interrupt = True`): the rest of the steps is left out."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """Of the instruction; a callback that sets `pipe._guidance_scale` changes it for the next steps."""
        return self._guidance_scale

    @property
    def visual_guidance_scale(self) -> float:
        """Of the example pair; a callback may set `pipe._visual_guidance_scale`."""
        return self._visual_guidance_scale

    # --- What goes in ---------------------------------------------------------------------------------------

    def unify(self, instructions: Iterable[str]) -> list[str]:
        """l' = U(l) of each instruction; as they stand where the editor was trained without U."""
        if self.llm is None:
            return list(instructions)
        if self.unifier is None or self.unifier.model is not self.llm:
            # Choice: no cache on disk here, since a greedy model only repeats itself.
            self.unifier = liu.InstructionUnifier(self.llm, self.llm_tokenizer)
        self.unifier.device = self._execution_device
        return self.unifier.unify(instructions)

    @torch.no_grad()
    def encode_prompt(self, texts: list[str]) -> Tensor:
        """Instructions, unified already → text embeddings (B, T, D) for cross-attention. A warning, once for
        each, where one is longer than the text encoder reads."""
        for text, line in backbone.cut_off(self.tokenizer, texts).items():
            _warn_once(text, line)
        return backbone.encode_text(self, texts, self._execution_device)

    def as_panel(self, picture: Picture) -> tuple[Tensor, tuple[int, int, int, int]]:
        """One picture → a panel (3, P, P) in [-1, 1], and the box in it that the picture fills.

        As diffusers has it: a PIL image, of any mode; or what `pixels_of` takes. Raises ValueError.
        """
        if isinstance(picture, np.ndarray | Tensor):
            pixels = pixels_of(picture)
            if pixels.shape[1:] == (self.panel, self.panel):
                return pixels, (0, 0, self.panel, self.panel)
            picture = tensor_to_image(pixels)
        if not isinstance(picture, Image.Image):
            raise ValueError(f"a picture is a PIL image, an array or a tensor, not {type(picture).__name__}")
        return fit_panel(picture, self.panel)

    # --- The steps ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = "",
        image: Picture | list[Picture] | None = None,
        prompt_pair: tuple[Picture, Picture] | list[tuple[Picture, Picture] | None] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        visual_guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        unify: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> InstructGIEPipelineOutput | tuple:
        """Edits pictures. What is given once holds for all.

        Args:
            prompt: the instruction, or one for each picture; "" edits by the example alone.
            image: the query, or several: see `as_panel`.
            prompt_pair: the example, (before, after), or one, or None, for each picture.
            num_inference_steps, guidance_scale (of the instruction), visual_guidance_scale (of the example):
                the editor's own settings where they are None. See `sample`.
            num_images_per_prompt: answers to each picture, which stand together.
            generator: of the noise: one for all, or one for each answer, which then depends on its own alone.
            latents: the noise itself, (B, C, 2p, 2p).
            output_type: "pil", of the inputs' aspect ratios, their long side P; "pt" (B, 3, P, P) and "np"
                (B, P, P, 3) in [0, 1]; "latent", whole grids (B, C, 2p, 2p): see `decode_answers`.
            unify: let U rewrite the instructions.
            callback_on_step_end: called after each step with the pipeline, the step's number, its timestep
                and the tensors that `callback_on_step_end_tensor_inputs` names; what it returns of
                `latents`, `prompt_embeds` and `condition` takes their place. `pred_original_sample` is the
                scheduler's x̂_0, or None. The two scales that it sets hold from the next step on; where they
                need other branches than before, these are encoded anew.

        Returns `InstructGIEPipelineOutput`, or without `return_dict` its two fields. Raises ValueError, also
        where anything that is drawn is not finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        batched = isinstance(image, np.ndarray | Tensor) and image.ndim == 4
        images = list(image) if isinstance(image, list | tuple) or batched else [image]
        if prompt_pair is None or _is_pair(prompt_pair):
            pairs: list[Any] = [prompt_pair]
        else:
            pairs = list(prompt_pair)
        count = max(len(prompts), len(images), len(pairs))
        for name, given in (("prompt", prompts), ("image", images), ("prompt_pair", pairs)):
            if len(given) not in (1, count):
                raise ValueError(f"{name} has {len(given)} entries, where another argument has {count}")
        if not all(isinstance(text, str) for text in prompts):
            raise ValueError("prompt must be a text, or a list of texts")
        if not any(prompts) and not any(pair is not None for pair in pairs):
            raise ValueError("nothing says which edit to make: give prompt, prompt_pair or both")
        if output_type not in ("pil", "pt", "np", "latent"):
            raise ValueError(f'output_type must be "pil", "pt", "np" or "latent", not {output_type!r}')
        num_images_per_prompt = _whole(num_images_per_prompt, "num_images_per_prompt")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, not {num_images_per_prompt}")

        told = self.unify(prompts) if unify else prompts
        queries, boxes = zip(*map(self.as_panel, images))
        grey = torch.zeros(2, 3, self.panel, self.panel)
        shown = [grey if p is None else torch.stack([self.as_panel(one)[0] for one in p]) for p in pairs]
        has_example = [pair is not None for pair in pairs]

        def for_each(given: Iterable) -> list:
            given = list(given) * (count if len(given) == 1 else 1)
            return [one for one in given for _ in range(num_images_per_prompt)]

        told, boxes = for_each(told), for_each(boxes)
        given = {"steps": num_inference_steps}
        given |= {"guidance_text": guidance_scale, "guidance_visual": visual_guidance_scale}
        drawn = self.sample(
            torch.stack(for_each(shown)),
            for_each(has_example),
            torch.stack(for_each(queries)),
            told,
            generator,
            **{name: self.settings[name] if value is None else value for name, value in given.items()},
            latents=latents,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        if output_type == "latent":
            answers: Any = drawn
        else:
            answers = self.decode_answers(drawn)
            if output_type == "pil":
                answers = [tensor_to_image(unfit(one, box)) for one, box in zip(answers, boxes)]
            else:
                answers = (answers + 1) / 2
        if output_type == "np":
            answers = answers.permute(0, 2, 3, 1).cpu().numpy()
        self.maybe_free_model_hooks()
        return InstructGIEPipelineOutput(answers, told) if return_dict else (answers, told)

    @torch.no_grad()
    def sample(
        self,
        examples: Tensor,
        has_example: list[bool] | None,
        queries: Tensor,
        instructions: list[str],
        generator: torch.Generator | list[torch.Generator] | None = None,
        steps: int = SAMPLING["steps"],
        guidance_text: float = SAMPLING["guidance_text"],
        guidance_visual: float = SAMPLING["guidance_visual"],
        latents: Tensor | None = None,
        callback: Callable[[Any, int, int, dict], dict] | None = None,
        callback_inputs: Iterable[str] = ("latents",),
    ) -> Tensor:
        """Draws the grids of B edits: latents (B, C, 2p, 2p), float32.

        Args:
            examples: (B, 2, 3, P, P) in [-1, 1], before and after. Ignored where `has_example` is false;
                None means that all samples have one.
            queries: (B, 3, P, P) in [-1, 1].
            instructions: B texts, unified already; "" for none.
            generator: one for all, or one for each sample: see `seeded`.
            guidance_text, guidance_visual: 1 is no guidance, 0 is no instruction and no example pair.

        Raises ValueError for lists of another length than B, more steps than there are timesteps, noise of
        another shape, and latents that are not finite: the message names the step and the part.

        Choice: two guidance scales, after InstructPix2Pix (Brooks et al., 2023, section 3.2.1). With the
        prediction e(text, pair), where 0 is an empty text or a grey example row, and the query stays:
            e = e(0, 0) + s_visual · (e(0, pair) - e(0, 0)) + s_text · (e(text, pair) - e(0, pair))
        """
        batch, many = len(queries), isinstance(generator, list | tuple)
        has_example = [True] * batch if has_example is None else has_example
        lengths = {len(x) for x in (examples, has_example, instructions, *([generator] if many else []))}
        if lengths != {batch}:
            raise ValueError("examples, has_example, queries, instructions and generators differ in length")
        timesteps = self.scheduler.config.num_train_timesteps
        steps = _whole(steps, "the number of steps")
        if not 1 <= steps <= timesteps:
            raise ValueError(f"the number of steps must be 1 … {timesteps}, not {steps}")
        if unknown := set(callback_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"a callback is given {self._callback_tensor_inputs}, not {sorted(unknown)}")
        scheduler, device, dtype = self.scheduler, self._execution_device, self.unet.dtype

        self._guidance_scale, self._visual_guidance_scale = guidance_text, guidance_visual

        def weigh() -> dict[tuple[bool, bool], float]:
            """The formula as weights, without the branches whose weight is zero: (text, pair) → weight."""
            # Where no sample has a pair (or a text), the first (the last) difference is zero whatever its
            # scale: take the one that saves most.
            s_visual = float(self._visual_guidance_scale) if any(has_example) else 1.0
            s_text = float(self._guidance_scale) if any(instructions) else s_visual
            weights = {(False, False): 1 - s_visual, (False, True): s_visual - s_text, (True, True): s_text}
            return {branch: weight for branch, weight in weights.items() if weight != 0}  # K of them

        examples, queries = examples.to(device, dtype), queries.to(device, dtype)
        shown = mask_query(compose_grid(*examples.unbind(1), queries, queries))  # (B, 3, 2P, 2P)
        alone = drop_example(shown)
        has_pair = torch.tensor(has_example, device=device).view(-1, 1, 1, 1)
        shown = torch.where(has_pair, shown, alone)
        told, silent = self.encode_prompt(instructions), self.encode_prompt([""] * batch)

        def encode() -> tuple[Tensor, Tensor]:
            """Text embeddings and encoded condition of all branches."""
            condition = torch.cat([shown if pair else alone for _, pair in branches])  # (K·B, 3, 2P, 2P)
            states = torch.cat([told if text else silent for text, _ in branches])  # (K·B, tokens, D)
            return states, self.rcldm.encode_condition(condition)

        branches = weigh()
        states, condition = encode()

        backbone.set_timesteps(scheduler, steps, device)
        shape = (batch, self.unet.config.in_channels, *[2 * self.panel // self.factor] * 2)
        if latents is None:
            latents = _noise(shape, generator)
        elif latents.shape != shape:
            raise ValueError(f"latents must be {shape}, not {tuple(latents.shape)}")
        x_t = (
            check_finite(latents, "the given latents").to(device, torch.float32) * scheduler.init_noise_sigma
        )
        taken = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in taken else {}
        self._interrupt, self._num_timesteps = False, len(scheduler.timesteps)
        with self.progress_bar(total=len(scheduler.timesteps)) as progress:
            for i, t in enumerate(scheduler.timesteps):
                if self._interrupt:
                    continue
                before, branches = branches, weigh()
                if branches.keys() != before.keys():
                    states, condition = encode()
                inputs = scheduler.scale_model_input(torch.cat([x_t] * len(branches)), t).to(dtype)
                down, mid = self.rcldm(inputs, t, states, condition, return_dict=False)
                residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
                predictions = self.unet(inputs, t, states, **residuals).sample.float().chunk(len(branches))
                prediction = sum(weight * e for weight, e in zip(branches.values(), predictions))
                step = scheduler.step(prediction, t, x_t, **extra)
                x_t = step.prev_sample
                if not x_t.isfinite().all():
                    parts = {"the instruction's embedding": [states], "the condition's encoding": [condition]}
                    parts |= {"the RCLDM's residuals": [*down, mid], "the guided prediction": [prediction]}
                    where = f"step {i + 1} of {self._num_timesteps}"
                    _refuse_step(where, parts | {"what the sampler makes of it": [x_t]})
                if callback is not None:
                    tensors = {"latents": x_t, "prompt_embeds": states, "condition": condition}
                    tensors["pred_original_sample"] = getattr(step, "pred_original_sample", None)
                    changed = callback(self, i, t, {name: tensors[name] for name in callback_inputs}) or {}
                    x_t, states = changed.get("latents", x_t), changed.get("prompt_embeds", states)
                    condition = changed.get("condition", condition)
                progress.update()
        return check_finite(x_t, "the grid as drawn")

    # --- What comes out -------------------------------------------------------------------------------------

    def answer(
        self,
        examples: Tensor,
        has_example: list[bool] | None,
        queries: Tensor,
        instructions: list[str],
        seeds: list[int],
        **sampling: Any,
    ) -> Tensor:
        """Edits: what `sample` takes, but seeds → the answers (B, 3, P, P) in [-1, 1], float32."""
        given = examples, has_example, queries, instructions
        return self.decode_answers(self.sample(*given, seeded(seeds), **sampling))

    @torch.no_grad()
    def decode_answers(self, latents: Tensor) -> Tensor:
        """Latents of grids (B, C, 2p, 2p) → the answers (B, 3, P, P) in [-1, 1], float32.

        Raises ValueError for what is not finite.
        """
        return check_finite(backbone.decode_latents(self.vae, answer_panel(latents)), "the VAE's picture")

    def decode_grids(self, latents: Tensor) -> Tensor:
        """Latents of grids (B, C, 2p, 2p) → all that was drawn, (B, 3, 2P, 2P) in [-1, 1], float32.

        Choice: panel by panel, as they were encoded in training, so that none shows at another's border.
        """
        empty = torch.zeros_like(answer_panel(latents))
        grids = [compose_grid(empty, empty, empty, panel) for panel in split_grid(latents)]
        return compose_grid(*map(self.decode_answers, grids))


def _check_settings(where: str, settings: dict[str, Any]) -> None:
    """Raises BackboneError for an editor's settings that nothing can be drawn with."""
    kinds = {"stable_diffusion": str, "llm": str | None, "panel": int, "steps": int}
    kinds |= dict.fromkeys(("guidance_text", "guidance_visual"), int | float)
    for name in kinds.keys() & settings.keys():
        value = settings[name]
        endless = isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, kinds[name]) or endless or (name == "panel" and not 0 < value <= 4096):
            raise backbone.BackboneError(f"{where} has {name} {repr(value)[:80]}")


@lru_cache(maxsize=1024)
def _warn_once(text: str, line: str) -> None:
    log.warning("%s", line)


def call_options(sampling: dict[str, Any]) -> dict[str, Any]:
    """What `SAMPLING` names, by the names that a call of the pipeline gives it."""
    names = {"steps": "num_inference_steps"}
    names |= {"guidance_text": "guidance_scale", "guidance_visual": "visual_guidance_scale"}
    return {name: sampling[ours] for ours, name in names.items()}


def seeded(seeds: Iterable[int]) -> list[torch.Generator]:
    """A generator for each seed; on the CPU, so that a seed means the same noise on every device."""
    return [torch.Generator().manual_seed(operator.index(seed)) for seed in seeds]


def _whole(number: Any, what: str) -> int:
    """An integer of any library as Python's. Raises ValueError for anything else."""
    try:
        return operator.index(number)
    except TypeError:
        raise ValueError(f"{what} must be a whole number, not {number!r}") from None


def _refuse_step(where: str, parts: dict[str, list[Tensor]]) -> None:
    """Raises ValueError for the first part of a step, in the order of their making, that is not finite."""
    for part, tensors in parts.items():
        if not all(tensor.isfinite().all() for tensor in tensors):
            advice = "take float32, or another sampler or number of steps"
            raise ValueError(f"{where}: NaN or infinity in {part}; {advice}")


def _noise(shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Of that shape, drawn where its generator is; each sample by its own where there are several."""
    if isinstance(generator, list | tuple):
        return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generator])
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device)


def _is_pair(given: Any) -> bool:
    """Whether this is one example, (before, after), and not several."""
    if isinstance(given, np.ndarray | Tensor):
        return given.ndim == 4
    one = given[0] if len(given) == 2 else None
    return isinstance(one, Image.Image) or (isinstance(one, np.ndarray | Tensor) and one.ndim == 3)


# --- Pictures of any kind and shape -------------------------------------------------------------------------


def pixels_of(picture: np.ndarray | Tensor) -> Tensor:
    """An array (H, W, 3) or a tensor (3, H, W) to float32 (3, H, W) in [-1, 1], on the CPU.

    Floats are in [0, 1], integers in 0 … 255, booleans black or white. Raises ValueError for another shape,
    and for values outside: of such a picture nobody can tell which range it means.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype.kind not in "buif":
            raise ValueError(f"a picture is an array of numbers, not of {picture.dtype}")
        has_levels, values = picture.dtype.kind in "ui", torch.from_numpy(picture.astype(np.float32))
        values = values.permute(2, 0, 1) if values.ndim == 3 else values
    else:
        has_levels = not (picture.is_floating_point() or picture.dtype == torch.bool)
        values = picture.detach().float().cpu()
    if values.ndim != 3 or len(values) != 3 or values.numel() == 0:
        raise ValueError(f"a picture is (3, H, W) or an array (H, W, 3), not {tuple(picture.shape)}")
    if not values.isfinite().all():
        raise ValueError("a picture holds values that are no finite numbers")
    low, high = (extreme.item() for extreme in values.aminmax())
    kind, white = ("integers", 255) if has_levels else ("floats", 1)
    if low < -1e-3 or high > white + 1e-3:  # floats may have been rounded
        raise ValueError(f"a picture of {kind} has a range of 0 … {white}, this one of {low:g} … {high:g}")
    return values.clamp(0, white) / (white / 2) - 1


def fit_panel(image: Image.Image, size: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The whole picture in a panel (3, P, P) in [-1, 1], and its box there: left, top, right, bottom.

    Choice: the long side is resized to P = `size` (Lanczos), the picture centred, and its border repeated
    to fill the square. Training crops instead; but whoever edits a picture wants all of it.
    """
    image = to_rgb(image)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (size - width) // 2, (size - height) // 2
    picture = image_to_tensor(image.resize((width, height), Image.Resampling.LANCZOS))
    border = (left, size - width - left, top, size - height - top)
    return F.pad(picture, border, mode="replicate"), (left, top, left + width, top + height)


def unfit(answer: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """The part (..., height, width) of a panel (..., P, P) that `fit_panel` filled with the picture.

    Choice: as drawn. It has the input's aspect ratio and a long side of P; enlarging would invent nothing.
    """
    left, top, right, bottom = box
    return answer[..., top:bottom, left:right]
