"""InstructGIE as a diffusers pipeline: a picture, and an example pair, or words, or both; the edit they show.

    pipe = InstructGIEPipeline.from_pretrained("runs/train/editor").to("cuda")
    edited = pipe("make it night", image, prompt_pair=(before, after)).images[0]

The edit itself is made in `edit.py`; this adds batches, callbacks, offloading and any kind of picture.

Symbols: B samples; P panel size in pixels, p in latent pixels; C latent channels; K branches of guidance.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import backbone
import edit
import liu
from backbone import SAMPLING
from dataset import answer_panel, compose_grid, split_grid
from edit import seeded
from pictures import check_finite, fit_panel, pixels_of, tensor_to_image, unfit
from rcldm import RCLDM
from training.card import model_card

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
        self.factor = backbone.vae_factor(vae)  # P / p
        if panel is None and rcldm.config.panel is None:
            raise backbone.BackboneError("the RCLDM does not tell its panels' size: give panel=P")
        panel = operator.index(rcldm.config.panel if panel is None else panel)
        if rcldm.config.panel is None:  # so that `components` tell it to another pipeline
            rcldm.register_to_config(panel=panel)
        backbone.check_fit(unet, vae, rcldm, panel)
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
                for name, part in pipe.components.items():
                    if isinstance(part, nn.Module) and name not in options:
                        backbone.check_model(part)
            return pipe
        dtype = options.pop("torch_dtype", None) or options.pop("dtype", None) or torch.float32
        sd, rcldm, llm, settings = backbone.load_parts(folder, dtype=dtype, words="llm" not in options)
        llm, llm_tokenizer = llm or (None, None)
        parts = {**sd._asdict(), "rcldm": rcldm, "llm": llm, "llm_tokenizer": llm_tokenizer}
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
            # [ours] No cache on disk here, since a greedy model only repeats itself.
            self.unifier = liu.InstructionUnifier(self.llm, self.llm_tokenizer)
        self.unifier.device = self._execution_device
        return self.unifier.unify(instructions)

    @torch.no_grad()
    def encode_prompt(self, texts: list[str]) -> Tensor:
        """Instructions, unified already → text embeddings (B, T, D) for cross-attention. A warning, once for
        each, where one is longer than the text encoder reads."""
        self._warn_of_cuts(texts)
        return backbone.encode_text(self, texts, self._execution_device)

    def _warn_of_cuts(self, texts: list[str]) -> None:
        for text, line in backbone.cut_off(self.tokenizer, texts).items():
            _warn_once(text, line)

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
            guidance_text, guidance_visual: the scales of `edit.guidance_weights`.

        Raises ValueError for lists of another length than B, more steps than there are timesteps, noise of
        another shape, and latents that are not finite: the message names the step.
        """
        batch, many = len(queries), isinstance(generator, list | tuple)
        has_example = [True] * batch if has_example is None else has_example
        lengths = {len(x) for x in (examples, has_example, instructions, *([generator] if many else []))}
        if lengths != {batch}:
            raise ValueError("examples, has_example, queries, instructions and generators differ in length")
        steps = _whole(steps, "the number of steps")
        if unknown := set(callback_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"a callback is given {self._callback_tensor_inputs}, not {sorted(unknown)}")
        device, dtype = self._execution_device, self.unet.dtype
        shape = (batch, self.unet.config.in_channels, *[2 * self.panel // self.factor] * 2)
        if latents is None:
            latents = _noise(shape, generator)
        elif latents.shape != shape:
            raise ValueError(f"latents must be {shape}, not {tuple(latents.shape)}")
        names = backbone.StableDiffusion._fields
        sd = backbone.StableDiffusion(*(getattr(self, name) for name in names))
        given = (x.to(device, dtype) for x in (examples, queries))
        grids = edit.condition_grids(*given, torch.tensor(has_example))
        self._guidance_scale, self._visual_guidance_scale = guidance_text, guidance_visual
        self._warn_of_cuts(instructions)

        def weigh() -> dict[tuple[bool, bool], float]:
            scales = self._guidance_scale, self._visual_guidance_scale
            return edit.guidance_weights(*scales, any(instructions), any(has_example))

        weights = weigh()
        self._interrupt, self._num_timesteps = False, steps
        with self.progress_bar(total=steps) as progress:

            def after_step(i: int, t: Tensor, output: Any, branches: edit.Branches) -> tuple:
                nonlocal weights
                progress.update()
                x_t = output.prev_sample
                if callback is None:
                    return x_t, branches
                tensors = {"latents": x_t, "prompt_embeds": branches.states, "condition": branches.condition}
                tensors["pred_original_sample"] = getattr(output, "pred_original_sample", None)
                changed = callback(self, i, t, {name: tensors[name] for name in callback_inputs}) or {}
                x_t = changed.get("latents", x_t)
                branches.states = changed.get("prompt_embeds", branches.states)
                branches.condition = changed.get("condition", branches.condition)
                before, weights = weights, weigh()
                if weights.keys() != before.keys():
                    branches = edit.encode_branches(sd, self.rcldm, grids, instructions, weights, device)
                branches.weights = [*weights.values()]
                return x_t, None if self._interrupt else branches

            branches = edit.encode_branches(sd, self.rcldm, grids, instructions, weights, device)
            noise = check_finite(latents, "the given latents").to(device)
            return edit.sample(sd, self.rcldm, branches, noise, steps, generator, after_step)

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
        return edit.decode_answers(self.vae, latents)

    def decode_grids(self, latents: Tensor) -> Tensor:
        """Latents of grids (B, C, 2p, 2p) → all that was drawn, (B, 3, 2P, 2P) in [-1, 1], float32.

        [ours] Panel by panel, as they were encoded in training, so that none shows at another's border.
        """
        empty = torch.zeros_like(answer_panel(latents))
        grids = [compose_grid(empty, empty, empty, panel) for panel in split_grid(latents)]
        return compose_grid(*map(self.decode_answers, grids))


@lru_cache(maxsize=1024)
def _warn_once(text: str, line: str) -> None:
    log.warning("%s", line)


def call_options(sampling: dict[str, Any]) -> dict[str, Any]:
    """What `SAMPLING` names, by the names that a call of the pipeline gives it."""
    names = {"steps": "num_inference_steps"}
    names |= {"guidance_text": "guidance_scale", "guidance_visual": "visual_guidance_scale"}
    return {name: sampling[ours] for ours, name in names.items()}


def _whole(number: Any, what: str) -> int:
    """An integer of any library as Python's. Raises ValueError for anything else."""
    try:
        return operator.index(number)
    except TypeError:
        raise ValueError(f"{what} must be a whole number, not {number!r}") from None


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
