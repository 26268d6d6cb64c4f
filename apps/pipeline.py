"""InstructGIE as a diffusers pipeline: a picture, and an example pair, or words, or both; the edit they show.

    pipe = InstructGIEPipeline.from_pretrained("runs/train/editor").to("cuda")
    edited = pipe("make it night", image, prompt_pair=(before, after)).images[0]

The edit itself is made in `edit.py`; this adds batches, callbacks and offloading.

Symbols: B samples; P panel size in pixels, p in latent pixels; C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import backbone
import edit
import liu
from backbone import SAMPLING
from edit import seeded
from pictures import fit_panel, tensor_to_image, unfit
from rcldm import RCLDM

log = logging.get_logger(__name__)

ExamplePair = tuple[Image.Image, Image.Image]  # before and after


class InstructGIEPipeline(DiffusionPipeline):
    """The frozen Stable Diffusion, the trained RCLDM and the unification module: load once, edit many.

    vae … scheduler: of a Stable Diffusion. rcldm: trained for its U-Net. llm, llm_tokenizer: of the module U;
    None leaves instructions as they stand. panel: P; None takes the RCLDM's own. settings: what `train.py`
    recorded, among it how to sample best. Raises BackboneError where the U-Net, the autoencoder and the RCLDM
    do not fit.
    """

    model_cpu_offload_seq = "llm->text_encoder->vae->unet"
    _exclude_from_cpu_offload: ClassVar = ["rcldm"]  # it works at every step, and by more ways than `forward`
    _optional_components: ClassVar = ["llm", "llm_tokenizer"]

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
        panel = rcldm.config.panel if panel is None else panel
        if panel is None:
            raise backbone.BackboneError("the RCLDM does not tell its panels' size; give panel=P")
        backbone.check_fit(unet, vae, rcldm, panel)
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
        parts |= {"scheduler": scheduler, "rcldm": rcldm, "llm": llm, "llm_tokenizer": llm_tokenizer}
        self.register_modules(**parts)
        self.register_to_config(panel=panel, settings=SAMPLING | (settings or {}))
        self.unifier = None if llm is None else liu.InstructionUnifier(llm, llm_tokenizer)
        self._interrupt = False

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
                if options.get("torch_dtype") == torch.float16:  # which overflows in LLMs of bfloat16
                    options["torch_dtype"] = {"default": torch.float16, "llm": torch.bfloat16}
                pipe = super().from_pretrained(folder, **{"use_safetensors": True, **options})
                for name, part in pipe.components.items():
                    if isinstance(part, nn.Module) and name not in options:
                        backbone.check_model(part)
            return pipe
        dtype = options.pop("torch_dtype", torch.float32)
        sd, rcldm, llm, settings = backbone.load_parts(folder, dtype=dtype, words="llm" not in options)
        llm, llm_tokenizer = llm or (None, None)
        parts = {**sd._asdict(), "rcldm": rcldm, "llm": llm, "llm_tokenizer": llm_tokenizer}
        return cls(**{**parts, **options}, panel=settings["panel"], settings=settings)

    @property
    def panel(self) -> int:
        return self.config.panel

    @property
    def settings(self) -> dict[str, Any]:
        """What `train.py` recorded of the training, and `SAMPLING`'s names: how to sample unless told."""
        return self.config.settings

    def unify(self, instructions: Iterable[str]) -> list[str]:
        """l' = U(l) of each instruction; as they stand where the editor was trained without U.

        [ours] No cache on disk here, since a greedy model only repeats itself.
        """
        if self.unifier is None:
            return list(instructions)
        self.unifier.device = self._execution_device
        return self.unifier.unify(instructions)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str | None] | None,
        image: Image.Image | list[Image.Image],
        prompt_pair: ExamplePair | list[ExamplePair | None] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        visual_guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        unify: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict | None] | None = None,
    ) -> ImagePipelineOutput:
        """Edits pictures. A list has one entry for each edit; what is no list holds for all.

        Args:
            prompt: the instruction; None or "" edits by the example alone.
            image: the query, of any size and mode.
            prompt_pair: the example, a tuple of before and after; None edits by the instruction alone.
            num_inference_steps, guidance_scale (of the instruction), visual_guidance_scale (of the example):
                the editor's own settings where they are None. See `edit.guidance_weights`.
            generator: of the noise: one for all, or one for each answer, which then depends on its own alone.
            output_type: "pil", of the inputs' aspect ratios, their long side P; "pt" (B, 3, P, P) in [0, 1];
                "latent", whole grids (B, C, 2p, 2p): see `decode_answers`.
            unify: let U rewrite the instructions.
            callback_on_step_end: called after each step with the pipeline, the step's number, its timestep
                and a dict of `latents` and `pred_original_sample`, the scheduler's x̂_0 or None. Other latents
                that it returns, in such a dict, take the place of these. Where it sets `pipe._interrupt`, the
                rest of the steps is left out.

        Raises ValueError, also where anything that is drawn is not finite.
        """
        lists = [given if isinstance(given, list) else [given] for given in (prompt, image, prompt_pair)]
        lengths = [len(given) for given in lists]
        if not set(lengths) <= {1, count := max(lengths)}:
            told = ", ".join(map(str, lengths))
            raise ValueError(f"prompt, image and prompt_pair have {told} entries: give one or equally many")
        prompts, images, pairs = (given if len(given) == count else given * count for given in lists)
        prompts = [text or "" for text in prompts]
        for number, (text, pair) in enumerate(zip(prompts, pairs), start=1):
            if not text.strip() and pair is None:
                told = f"of {count}, edit {number}: " if count > 1 else ""
                raise ValueError(
                    f"{told}nothing says which edit to make: give an instruction, an example or both"
                )
        if any(
            pair is not None and not (isinstance(pair, tuple | list) and len(pair) == 2) for pair in pairs
        ):
            raise ValueError("an example pair is a tuple (before, after); a list has one for each edit")
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f'output_type must be "pil", "pt" or "latent", not {output_type!r}')

        told = self.unify(prompts) if unify else prompts
        queries, boxes = zip(*(fit_panel(picture, self.panel) for picture in images))
        grey = [torch.zeros(3, self.panel, self.panel)] * 2
        examples = [[fit_panel(one, self.panel)[0] for one in pair] if pair else grey for pair in pairs]
        examples = torch.stack([torch.stack(pair) for pair in examples])  # (B, 2, 3, P, P)
        scales = guidance_scale, visual_guidance_scale
        sampling = generator, num_inference_steps, *scales, callback_on_step_end
        drawn = self.sample(examples, [*map(bool, pairs)], torch.stack(queries), told, *sampling)
        answers: Any = drawn if output_type == "latent" else self.decode_answers(drawn)
        if output_type == "pil":
            answers = [tensor_to_image(unfit(one, box)) for one, box in zip(answers, boxes)]
        elif output_type == "pt":
            answers = (answers + 1) / 2
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(answers)

    @torch.no_grad()
    def sample(
        self,
        examples: Tensor,
        has_example: list[bool] | None,
        queries: Tensor,
        instructions: list[str],
        generator: torch.Generator | list[torch.Generator] | None = None,
        steps: int | None = None,
        guidance_text: float | None = None,
        guidance_visual: float | None = None,
        callback: Callable[[Any, int, Tensor, dict], dict | None] | None = None,
    ) -> Tensor:
        """Draws the grids of B edits: latents (B, C, 2p, 2p), float32.

        Args:
            examples: (B, 2, 3, P, P) in [-1, 1], before and after. Ignored where `has_example` is false;
                None means that all samples have one.
            queries: (B, 3, P, P) in [-1, 1].
            instructions: B texts, unified already; "" for none.
            the others: as in a call of the pipeline. Raises ValueError, as a call does.
        """
        batch, device, dtype = len(queries), self._execution_device, self.unet.dtype
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators, where there are {batch} answers to draw")
        has_example = [True] * batch if has_example is None else has_example
        given = {"steps": steps, "guidance_text": guidance_text, "guidance_visual": guidance_visual}
        used = {name: self.settings[name] if value is None else value for name, value in given.items()}
        for line in backbone.cut_off(self.tokenizer, instructions).values():
            log.warning_once(line)

        side = 2 * self.panel // self.factor
        noise = randn_tensor((batch, self.unet.config.in_channels, side, side), generator, device)
        sd = backbone.StableDiffusion(*(getattr(self, name) for name in backbone.StableDiffusion._fields))
        examples, queries = examples.to(device, dtype), queries.to(device, dtype)
        grids = edit.condition_grids(examples, queries, torch.tensor(has_example))
        weights = edit.guidance_weights(
            used["guidance_text"], used["guidance_visual"], any(instructions), any(has_example)
        )
        branches = edit.encode_branches(sd, self.rcldm, grids, instructions, weights, device)
        self._interrupt = False
        with self.progress_bar(total=used["steps"]) as progress:

            def after_step(i: int, t: Tensor, output: Any) -> tuple[Tensor, bool]:
                progress.update()
                tensors = {"latents": output.prev_sample}
                tensors["pred_original_sample"] = getattr(output, "pred_original_sample", None)
                if callback is not None:
                    tensors |= callback(self, i, t, tensors) or {}
                return tensors["latents"], not self._interrupt

            return edit.sample(sd, self.rcldm, branches, noise, used["steps"], generator, after_step)

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

    def decode_answers(self, latents: Tensor) -> Tensor:
        """`edit.decode_answers` by this VAE: latents (B, C, 2p, 2p) → (B, 3, P, P) in [-1, 1]."""
        return edit.decode_answers(self.vae, latents)
