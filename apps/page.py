"""A page to try an editor on: drop an example pair, or say the edit, drop your pictures, and see them edited.

    python -m apps.page                                          # the toy world's editor, at http://127.0.0.1:7860
    python -m apps.page --model runs/train/editor --port 8000    # one that train.py saved

A thin shell over `InstructGIEPipeline` in apps/pipeline.py. This file's order: an edit, as the page
asks for it; the page; the examples on it; the command.
"""

from __future__ import annotations

import argparse
import html
import math
import os
import queue
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("apps.page", description="Serve a page on which pictures are edited.")
    add = parser.add_argument
    add("--model", help="an editor's folder, as train.py saves it (default: the toy world's)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 lets in whoever reaches this machine")
    add("--port", type=int, default=7860)
    add("--max-pixels", type=int, default=25_000_000, help="of a picture; a larger one is not decoded")
    add("--max-upload", type=int, default=20, help="megabytes of a file")
    add("--queue", type=int, default=8, help="edits that may wait while one is made")
    return parser.parse_args()


if __name__ == "__main__":
    arguments()  # answers --help and misspelt options before the imports below, which take seconds

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}  # it reads them early

import diffusers
import transformers

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise SystemExit(f"apps.page: error: {error}; pip install -r requirements-dev.txt") from None
from PIL import Image
from torchvision.utils import make_grid

import backbone
from apps.pipeline import InstructGIEPipeline, call_options, seeded
from backbone import SAMPLING
from edit import SCHEDULERS
from pictures import ImageError, load_image, tensor_to_image, unfit
from pictures.answers import labelled_grid, save_png
from toy import world

MOST_INPUTS, MOST_ANSWERS = 8, 4  # of an edit, and to each input
LONGEST = 500  # letters of an instruction
PREVIEWS = 10  # at most as many of an edit's steps are shown
CSS = """
.drawn img { image-rendering: pixelated }
.grid-wrap { padding-top: 2.25rem !important }
.gallery-container:has(.preview) { min-height: 26rem }
"""

# --- An edit ------------------------------------------------------------------------------------------------


class Wish(NamedTuple):
    """What the page asks for: files, words and settings."""

    before: str | None
    after: str | None
    inputs: list[tuple[str, str | None]] | None  # with captions, of which the page makes no use
    instruction: str | None
    seed: int
    answers: int  # to each input
    steps: int
    guidance_text: float
    guidance_visual: float
    scheduler: str


class Editor:
    """Makes edits, one at a time, in a thread of its own: meanwhile the page shows how far it is.

    model: the pipeline's name, for the answers' records. folder: for all that is written.
    """

    def __init__(self, pipe: InstructGIEPipeline, model: str, folder: Path) -> None:
        self.pipe, self.model, self.folder = pipe, model, folder
        self.schedule = pipe.scheduler.config  # as it came: each edit chooses its sampler
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.edits: dict[str, Edit] = {}  # by the page that waits for it

    def edit(self, request: gr.Request, *wish: Any) -> Iterator[tuple]:
        """What an `Edit` shows, as it comes. Raises gr.Error, whose message is one line."""
        shown: queue.SimpleQueue = queue.SimpleQueue()
        edit = self.edits[request.session_hash] = Edit(self, Wish(*wish), shown.put)
        job = self.thread.submit(edit.run)
        job.add_done_callback(lambda _: shown.put(None))
        try:
            yield from iter(shown.get, None)
            job.result()
            for line in backbone.cut_off(self.pipe.tokenizer, [edit.unified]).values():
                gr.Warning(html.escape(line))
            if edit.stopped:
                gr.Info("Stopped.")
        except (ValueError, NotImplementedError) as error:  # the latter of samplers that do not fit the U-Net
            line = html.escape(" ".join(str(error).split()))  # Gradio shows it as HTML
            raise gr.Error(line, print_exception=False) from None
        except Exception as error:  # too little memory, for one; the page goes on
            raise gr.Error(f"{type(error).__name__}: the server's terminal says more") from error
        finally:  # also where the page was closed
            edit.stopped = True
            self.edits.pop(request.session_hash, None)

    def stop(self, request: gr.Request) -> None:
        """Ends the edit that this page waits for, after the step in hand."""
        if edit := self.edits.get(request.session_hash):
            edit.stopped = True


class Edit:
    """One wish, and what there is to see of it so far."""

    def __init__(self, editor: Editor, wish: Wish, show: Callable[[tuple], None]) -> None:
        self.editor, self.wish, self._show = editor, wish, show
        self.stopped = False
        self.unified = ""
        self.steps: list[tuple[str, str]] = []  # of the input in hand: files and captions
        self.answers: list[tuple[str, str]] = []
        self.grids: list[str] = []

    def show(self) -> None:
        """Hands on: the unified instruction, steps, answers, the answers' files and the grids."""
        files = [file for file, _ in self.answers]
        self._show((self.unified, [*self.steps], [*self.answers], files, [*self.grids]))

    def run(self) -> None:
        """Edits input after input. Raises ValueError for a wish that cannot be met."""
        wish, pipe = self.wish, self.editor.pipe
        files, example = [file for file, _ in wish.inputs or []], [wish.before, wish.after]
        instruction = " ".join((wish.instruction or "").split())
        settings = {name: getattr(wish, name) for name in SAMPLING}
        instruction.encode()  # raises a ValueError for what is no text
        if not 1 <= len(files) <= MOST_INPUTS:
            raise ValueError(f"give 1 … {MOST_INPUTS} pictures to edit, not {len(files)}")
        if len(instruction) > LONGEST:
            raise ValueError(f"an instruction has at most {LONGEST} letters, not {len(instruction)}")
        if any(example) and not all(example):
            raise ValueError("an example is two pictures: give before and after, or neither")
        if not any(example) and not instruction:
            raise ValueError("nothing says which edit to make: give an example, an instruction or both")
        numbers = [wish.seed, wish.answers, *settings.values()]
        if any(number is None or not math.isfinite(number) for number in numbers):
            raise ValueError("every setting must be a finite number")
        if any(number != int(number) for number in (wish.seed, wish.answers, wish.steps)):
            raise ValueError("seed, answers and steps must be whole numbers")
        settings["steps"] = int(wish.steps)
        pair = tuple(map(picture, filter(None, example))) or None
        for file in files:
            picture(file)  # a broken one should show before the others are edited

        (self.unified,) = pipe.unify([instruction])
        pipe.scheduler = getattr(diffusers, SCHEDULERS[wish.scheduler]).from_config(self.editor.schedule)
        folder = Path(tempfile.mkdtemp(dir=self.editor.folder))
        seeds = range(int(wish.seed), int(wish.seed + wish.answers))
        made_with = {"instruction": instruction, "unified": self.unified, **settings}
        made_with |= {"prompt_pair": [Path(file).name for file in example if file]}
        made_with |= {"scheduler": wish.scheduler, "model": self.editor.model, "dtype": "float32"}
        made_with |= {"device": str(pipe.device)}
        for i, file in enumerate(files):
            query, name, self.steps = picture(file), Path(file).name, []
            self.folder, self.box = folder / str(i), pipe.as_panel(query)[1]
            self.folder.mkdir()
            self.show()
            answers = pipe(
                self.unified,
                query,
                pair,
                **call_options(settings),
                num_images_per_prompt=len(seeds),
                generator=seeded(seeds),
                unify=False,
                callback_on_step_end=self.after_step,
                callback_on_step_end_tensor_inputs=("latents", "pred_original_sample"),
            ).images
            if self.stopped:  # what it has drawn is no answer yet
                return
            for seed, answer in zip(seeds, answers):
                made = made_with | {"input": name, "seed": seed}
                path, grid = (self.folder / f"{Path(name).stem}_{seed}{end}.png" for end in ("", "_grid"))
                save_png(answer, path, made)
                save_png(labelled_grid(pair, query, answer, instruction, pipe.panel), grid, made)
                self.answers.append((str(path), f"seed {seed}"))
                self.grids.append(str(grid))
            self.show()

    def after_step(self, pipe: InstructGIEPipeline, step: int, t: Any, tensors: dict[str, Any]) -> dict:
        """Shows what the answers would be after this step, in one picture."""
        pipe._interrupt, step, last = self.stopped, step + 1, pipe.num_timesteps
        if step % math.ceil(last / PREVIEWS) == 0 or step == last:
            clean = tensors["pred_original_sample"]  # of most samplers; else x_t is shown, noisy as it is
            drawn = pipe.decode_answers(tensors["latents"] if clean is None else clean)
            path = self.folder / f"step_{step}.png"
            sheet = make_grid(unfit(drawn, self.box), nrow=math.ceil(len(drawn) ** 0.5), padding=0)
            tensor_to_image(sheet).save(path)
            self.steps.append((str(path), f"{step}"))
            self.show()
        return {}


def picture(file: str) -> Image.Image:
    """An upload. Raises ImageError, which does not say where uploads lie."""
    try:
        return load_image(file)
    except ImageError as error:
        raise ImageError(str(error).replace(f"{Path(file).parent}{os.sep}", "")) from None


# --- The page -----------------------------------------------------------------------------------------------


def build(editor: Editor, examples: list[list]) -> gr.Blocks:
    """The page. examples: rows of before, after, inputs and instruction."""
    usual = editor.pipe.settings

    def one_picture(label: str) -> gr.Image:
        sources = ["upload", "clipboard"]
        place = gr.Image(label=label, type="filepath", sources=sources, height=180, buttons=[])
        place.preprocess = lambda file: file and file.path  # Gradio would open it, within no limits of ours
        return place

    def pictures(label: str, columns: int, **options: Any) -> gr.Gallery:
        options = {"interactive": False, "height": "fit-content", "elem_classes": "drawn"} | options
        options |= {"columns": columns, "fit_columns": False, "object_fit": "contain", "buttons": []}
        return gr.Gallery(label=label, **options)

    with gr.Blocks(title="InstructGIE", delete_cache=(3600, 86400)) as page:
        gr.Markdown(
            "# InstructGIE\nShow one finished edit, or say it, or both; your pictures are edited alike."
        )
        with gr.Row():
            with gr.Column():
                with gr.Row():
                    before, after = one_picture("Example before"), one_picture("Example after")
                inputs = pictures("Inputs", 4, interactive=True, type="filepath", file_types=["image"])
                instruction = gr.Textbox(label="Instruction", placeholder="make it night", max_length=LONGEST)
                with gr.Row():
                    go, stop = gr.Button("Edit", variant="primary"), gr.Button("Stop")
                with gr.Accordion("Settings", open=False):
                    with gr.Row():
                        steps = gr.Slider(1, max(100, usual["steps"]), usual["steps"], step=1, label="Steps")
                        answers = gr.Slider(1, MOST_ANSWERS, 1, step=1, label="Answers to each input")
                        seed = gr.Number(0, label="Seed of the first", precision=0, minimum=0, maximum=2**32)
                    with gr.Row():
                        text = gr.Slider(0, 10, usual["guidance_text"], label="Guidance by the instruction")
                        visual = gr.Slider(0, 10, usual["guidance_visual"], label="Guidance by the example")
                    scheduler = gr.Dropdown(list(SCHEDULERS), value="ddim", label="Scheduler")
                if examples:
                    gr.Examples(examples, [before, after, inputs, instruction])
            with gr.Column():
                unified = gr.Textbox(label="Instruction, unified", interactive=False)
                shown = pictures("Steps", 5)
                made = pictures("Answers", 4)
                files = gr.File(label="Answers, to download", file_count="multiple", interactive=False)
                grids = pictures("Grids", 2, elem_classes=[])
        wish = [before, after, inputs, instruction, seed, answers, steps, text, visual, scheduler]
        seen = [unified, shown, made, files, grids]
        go.click(editor.edit, wish, seen, concurrency_limit=1, show_progress_on=unified)
        stop.click(editor.stop, queue=False)
    return page


def toy_examples(folder: Path) -> list[list]:
    """Rows for `build`: the pair of examples/; words alone; a pair of an edit that it has not learnt."""
    given = backbone.HERE / "examples"
    before, after, query = (str(given / f"{name}.png") for name in ("before", "after", "input"))
    rng, frame = random.Random(0), world.Edit("frame", "", "blue")
    scenes = [world.random_scene(rng) for _ in range(3)]
    paths = [str(folder / f"{name}.png") for name in ("scene_1", "scene_2", "scene_3", "framed")]
    for path, scene in zip(paths, [*scenes, frame.apply(scenes[0])]):
        world.render(scene).save(path)
    rows = [[before, after, [query], ""], [None, None, [query], "maybe night view looks better"]]
    return [*rows, [paths[0], paths[3], paths[1:3], ""]]


# --- The command --------------------------------------------------------------------------------------------


@backbone.one_line_errors("apps.page")
def main() -> None:
    args = arguments()
    backbone.check_numbers(args, {(1, math.inf): "max_pixels max_upload queue", (1, 65535): "port"})
    transformers.logging.disable_progress_bar()  # of every part's loading
    diffusers.utils.logging.disable_progress_bar()
    model, device = args.model or backbone.PRESETS["toy"].editor, backbone.pick_device(args.device)
    pipe = InstructGIEPipeline.from_pretrained(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    Image.MAX_IMAGE_PIXELS = args.max_pixels  # which `load_image` compares with the file's header
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the folder goes
    with tempfile.TemporaryDirectory(prefix="instructgie-") as name:
        folder = Path(name).resolve()
        # All that is served. Gradio's own choice is a folder which all its pages on a machine share.
        os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_EXAMPLES_CACHE": str(folder / "examples")}
        editor = Editor(pipe, str(model), folder)
        page = build(editor, [] if args.model else toy_examples(folder)).queue(max_size=args.queue)
        try:
            _, url, _ = page.launch(
                server_name=args.host,
                server_port=args.port,
                max_file_size=f"{args.max_upload}mb",
                css=CSS,
                share=False,
                ssr_mode=False,
                enable_monitoring=False,
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise OSError(f"--host {args.host} --port {args.port}: cannot listen there") from error
        print(url, flush=True)
        try:
            page.block_thread()
        finally:  # an edit in hand would be waited for
            for edit in [*editor.edits.values()]:
                edit.stopped = True


if __name__ == "__main__":
    main()
