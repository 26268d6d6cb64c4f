"""A page to try an editor on: drop an example pair, or say the edit, drop your picture, and see it edited.

    python -m apps.page                                          # the toy world's editor, at http://127.0.0.1:7860
    python -m apps.page --model runs/train/editor --port 8000    # one that train.py saved

A thin shell over `InstructGIEPipeline` in apps/pipeline.py. This file's order: an edit, as the page
asks for it; the page; the examples on it; the command.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import math
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("apps.page", description="Serve a page on which pictures are edited.")
    add = parser.add_argument
    add("--model", help="an editor's folder, as train.py saves it (default: the toy world's)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 lets in whoever reaches this machine")
    add("--port", type=int, default=7860)
    return parser.parse_args()


if __name__ == "__main__":
    arguments()  # answers --help and misspelt options before the imports below, which take seconds

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}  # it reads them early

from PIL import Image

import backbone

with backbone.one_line_errors("apps.page"):  # where one of requirements-dev.txt is missing
    import gradio as gr

    from apps.hood import SENTENCES, Hood
from apps.pipeline import InstructGIEPipeline
from edit import seeded
from pictures import ImageError, fit_panel, load_image, misfit, tensor_to_image, unfit
from pictures.answers import grid_path, labelled_grid, save_png
from toy import world

PREVIEWS = 10  # at most as many of an edit's steps are shown
LETTERS = 500  # of an instruction, at most
CSS = """
.drawn img { image-rendering: pixelated }
.image-frame img { object-fit: contain }
.grid-wrap, .image-container { padding-top: 2.25rem !important; overflow: hidden !important }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)) !important }
.gallery-container:has(.preview) { min-height: 26rem }
"""

# --- An edit ------------------------------------------------------------------------------------------------


class Editor:
    """Makes edits, one at a time, in a thread of its own: meanwhile the page shows how far it is.

    model: the pipeline's name, for the answers' records. folder: for all that is written.
    """

    def __init__(self, pipe: InstructGIEPipeline, model: str, folder: Path) -> None:
        self.pipe, self.model, self.folder = pipe, model, folder
        self.schedule = pipe.scheduler  # as it came: each edit chooses its sampler
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.stop = Event()  # set, it ends the edit in hand after the step in hand
        self.hood: Hood | None = None  # CLIP and the segmenter are loaded when somebody looks

    def edit(self, *wish: Any) -> Iterator[tuple]:
        """What `_edit` shows, as it comes. Raises gr.Error, whose message is one line."""
        stop = self.stop = Event()
        try:
            with told():
                yield from self._edit(stop, *wish)
        finally:  # Gradio closes this where Stop is pressed, or the page is closed
            stop.set()

    def _edit(
        self,
        stop: Event,
        before: str | None,
        after: str | None,
        query: str | None,
        instruction: str | None,
        seed: int | None,
        steps: int,
        guidance_text: float,
        guidance_visual: float,
        scheduler: str,
    ) -> Iterator[tuple]:
        """Edits a picture. Yields what there is to see so far: the unified instruction, the steps with their
        captions, the answer, the labelled grid, and what `look` takes. Raises ValueError for a wish that
        cannot be met."""
        pipe, instruction = self.pipe, " ".join((instruction or "").split())
        example = [file for file in (before, after) if file]
        if len(instruction) > LETTERS:
            raise ValueError(f"an instruction has at most {LETTERS} letters, not {len(instruction)}")
        if query is None:
            raise ValueError("give a picture to edit")
        if len(example) == 1:
            raise ValueError("an example is two pictures: give before and after, or neither")
        if seed is None:
            raise ValueError("give a seed")
        pair, image = tuple(map(picture, example)) or None, picture(query)
        if pair and (reason := misfit(*pair)):
            gr.Warning(f"The picture after has {reason}. The example may teach another edit.")
        (unified,) = pipe.unify([instruction])
        for line in backbone.cut_off(pipe.tokenizer, [unified]).values():
            gr.Warning(html.escape(line))

        folder = Path(tempfile.mkdtemp(dir=self.folder))
        shown: SimpleQueue = SimpleQueue()  # of steps, and None behind the last
        _, box = fit_panel(image, pipe.panel)

        def after_step(pipe: InstructGIEPipeline, i: int, t: Any, tensors: dict[str, Any]) -> None:
            """Shows what the answer would be after this step."""
            pipe._interrupt, step, last = stop.is_set(), i + 1, len(pipe.scheduler.timesteps)
            if step % math.ceil(last / PREVIEWS) == 0 or step == last:
                clean = tensors["pred_original_sample"]  # of most samplers; else x_t is shown, noisy as it is
                (drawn,) = pipe.decode_answers(tensors["latents"] if clean is None else clean)
                path = folder / f"step_{step}.png"
                tensor_to_image(unfit(drawn, box)).save(path)
                shown.put((str(path), f"{step}"))

        def draw() -> Image.Image:
            try:
                pipe.scheduler = backbone.new_sampler(scheduler, self.schedule)
                settings = {"num_inference_steps": steps, "guidance_scale": guidance_text}
                settings |= {"visual_guidance_scale": guidance_visual, "generator": seeded([seed])}
                made = pipe(unified, image, pair, **settings, unify=False, callback_on_step_end=after_step)
                return made.images[0]
            finally:
                shown.put(None)

        job, previews = self.thread.submit(draw), []
        yield unified, [], None, None, None
        for preview in iter(shown.get, None):
            previews.append(preview)
            yield unified, [*previews], None, None, None
        answer = job.result()
        if stop.is_set():  # the program ends
            return
        record = {"instruction": instruction, "unified": unified, "input": Path(query).name, "seed": seed}
        record |= {"prompt_pair": [Path(file).name for file in example], "steps": steps}
        record |= {"guidance_text": guidance_text, "guidance_visual": guidance_visual, "scheduler": scheduler}
        record |= {"model": self.model, "dtype": "float32", "device": str(pipe.device)}
        path = folder / f"{Path(query).stem}_{seed}.png"
        save_png(answer, path, record)
        grid = labelled_grid(pair, image, answer, instruction, pipe.panel)
        save_png(grid, grid_path(path), record)
        # As small as the model sees them: the page keeps them for an hour.
        seen = [tensor_to_image(unfit(*fit_panel(one, pipe.panel))) for one in (image, *(pair or ()))]
        yield unified, previews, str(path), str(grid_path(path)), (seen[1:] or None, seen[0], answer, unified)

    def look(self, made: tuple | None) -> Image.Image:
        """What the parts see of the edit that was made last. Raises gr.Error where there is none."""
        with told():
            if made is None:
                raise ValueError("edit a picture first")
            if self.hood is None:
                self.hood = Hood(self.pipe.settings, self.pipe.panel, self.pipe.device)
            return self.hood.draw(*made)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What goes wrong is told on the page, in one line, and the page goes on. Raises gr.Error."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:  # the latter of a sampler, for a kind of prediction
        line = html.escape(" ".join(str(error).split()))  # Gradio shows it as HTML
        raise gr.Error(line, print_exception=False) from None
    except Exception as error:  # too little memory, for one
        raise gr.Error(f"{type(error).__name__}: the server's terminal says more") from error


def picture(file: str) -> Image.Image:
    """An upload. Raises ImageError, which does not say where uploads lie."""
    try:
        return load_image(file)
    except ImageError as error:
        raise ImageError(str(error).replace(f"{Path(file).parent}{os.sep}", "")) from None


# --- The page -----------------------------------------------------------------------------------------------


def build(editor: Editor, examples: list[list]) -> gr.Blocks:
    """The page. examples: rows of before, after, input and instruction."""
    usual = editor.pipe.settings

    def given(label: str) -> gr.Image:
        options = {"type": "filepath", "sources": ["upload", "clipboard"], "height": 200, "buttons": []}
        place = gr.Image(label=label, alt_text=label, **options)
        place.preprocess = lambda file: file and file.path  # Gradio would open it, within no limits of ours
        return place

    def drawn(label: str, **options: Any) -> gr.Image:
        buttons = ["download", "fullscreen"]
        return gr.Image(label=label, alt_text=label, interactive=False, buttons=buttons, **options)

    with gr.Blocks(title="InstructGIE", delete_cache=(3600, 86400)) as page:
        gr.Markdown(
            "# InstructGIE\nShow one finished edit, or say it, or both; your picture is edited alike."
        )
        with gr.Row():
            with gr.Column():
                with gr.Row():
                    before, after, query = map(given, ("Example before", "Example after", "Input"))
                instruction = gr.Textbox(label="Instruction", placeholder="make it night")
                with gr.Row():
                    go, stop = gr.Button("Edit", variant="primary"), gr.Button("Stop")
                with gr.Accordion("Settings", open=False):
                    with gr.Row():
                        steps = gr.Slider(1, max(100, usual["steps"]), usual["steps"], step=1, label="Steps")
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32)
                    with gr.Row():
                        text = gr.Slider(0, 10, usual["guidance_text"], label="Text guidance")
                        visual = gr.Slider(0, 10, usual["guidance_visual"], label="Visual guidance")
                    scheduler = gr.Dropdown(list(backbone.SAMPLERS), value="ddim", label="Scheduler")
                if examples:
                    gr.Examples(examples, [before, after, query, instruction])
            with gr.Column():
                unified = gr.Textbox(label="Instruction, unified", interactive=False)
                fitted = {"height": "fit-content", "object_fit": "contain", "buttons": []}
                shown = gr.Gallery(label="Steps", interactive=False, elem_classes="drawn", **fitted)
                answer = drawn("Answer", elem_classes="drawn", height=340)
                grid = drawn("Grid")
        with gr.Accordion("Under the hood", open=False):
            gr.Markdown(SENTENCES)
            look = gr.Button("Show this edit's condition, areas and shifts")
            hooded = drawn("Condition, areas and shifts", show_label=False, format="png")
        wish = [before, after, query, instruction, seed, steps, text, visual, scheduler]
        seen = [unified, shown, answer, grid, made := gr.State()]
        go.click(None, None, hooded, js="() => null")  # it was of the edit before; Gradio calls in this order
        going = go.click(editor.edit, wish, seen, concurrency_limit=1, show_progress_on=unified)
        stop.click(None, cancels=going)
        look.click(editor.look, made, hooded)
    return page


def toy_examples(folder: Path) -> list[list]:
    """Rows for `build`: the pair of examples/; words alone; a pair of an edit that it has not learnt."""
    given = backbone.HERE / "examples"
    before, after, query = (str(given / f"{name}.png") for name in ("before", "after", "input"))
    rng, frame = random.Random(0), world.Edit("frame", "", "blue")
    scene, other = (world.random_scene(rng) for _ in range(2))
    plain, framed, new = (str(folder / f"{name}.png") for name in ("plain", "framed", "new"))
    for path, drawn in ((plain, scene), (framed, frame.apply(scene)), (new, other)):
        world.render(drawn).save(path)
    by_words = [None, None, before, "maybe night view looks better"]
    return [[before, after, query, ""], by_words, [plain, framed, new, ""]]


@backbone.one_line_errors("apps.page")
def main() -> None:
    args = arguments()
    backbone.check_numbers(args, {(1, 65535): "port"})
    backbone.hide_progress_bars()
    model, device = args.model or backbone.PRESETS["toy"].editor, backbone.pick_device(args.device)
    pipe = InstructGIEPipeline.from_pretrained(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    Image.MAX_IMAGE_PIXELS = 25_000_000  # which `load_image` compares with the file's header
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the folder goes
    with tempfile.TemporaryDirectory(prefix="instructgie-") as name:
        folder = Path(name).resolve()
        # All that is served. Gradio's own choice is a folder which all its pages on a machine share.
        os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_EXAMPLES_CACHE": str(folder / "examples")}
        editor = Editor(pipe, str(model), folder)
        page = build(editor, [] if args.model else toy_examples(folder)).queue(max_size=8)
        _, url, _ = page.launch(
            server_name=args.host,
            server_port=args.port,
            max_file_size="20mb",
            css=CSS,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
        print(url, flush=True)
        try:
            page.block_thread()
        finally:
            editor.stop.set()  # an edit in hand would be waited for


if __name__ == "__main__":
    main()
