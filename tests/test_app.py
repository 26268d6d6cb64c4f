"""apps/page.py: what the page calls, what its server lets through, and the page itself in a browser."""

import base64
import html
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio.data_classes import ImageData
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import backbone
from apps import page as app
from apps.hood import INK, TINT
from apps.pipeline import InstructGIEPipeline, seeded
from edit import labelled_grid
from pictures import load_image
from toy import doctor, score

EXAMPLES = backbone.HERE / "examples"
BEFORE, AFTER, INPUT = (str(EXAMPLES / f"{name}.png") for name in ("before", "after", "input"))


@pytest.fixture(scope="module")
def pipe():
    pipe = InstructGIEPipeline.from_pretrained(backbone.PRESETS["toy"].editor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def editor(pipe, tmp_path):
    (tmp_path / "served").mkdir()
    return app.Editor(pipe, "toy", tmp_path / "served")


def wish(**changes):
    """An edit by the example pair alone, in two steps."""
    given = {"before": BEFORE, "after": AFTER, "query": INPUT, "instruction": "", "seed": 0, "steps": 2}
    given |= {"guidance_text": 1.0, "guidance_visual": 1.0, "scheduler": "ddim"}
    return (given | changes).values()


def edit(editor, **changes):
    """All that the page shows of one edit."""
    return list(editor.edit(*wish(**changes)))


# ------------------------------------------------------------------------------------------- an edit


def test_steps_come_first_then_the_answer_that_tells_how_it_was_made(editor, pipe, tmp_path):
    wide = tmp_path / "wide.png"
    load_image(INPUT).crop((0, 0, 64, 32)).save(wide)
    shown = edit(editor, query=str(wide), seed=3, steps=4, instruction=" maybe  night view looks better")
    assert {unified for unified, *_ in shown} == {"make it night"}
    assert [len(steps) for _, steps, *_ in shown] == [0, 1, 2, 3, 4, 4]
    assert all((answer, grid) == (None, None) for _, _, answer, grid, _ in shown[:-1])

    _, steps, answer, grid, _ = shown[-1]
    assert [caption for _, caption in steps] == ["1", "2", "3", "4"]
    assert len({Path(path).read_bytes() for path, _ in steps}) == 4
    assert Path(answer).name == "wide_3.png"
    assert [Image.open(path).size for path in (steps[0][0], answer)] == [(64, 32)] * 2

    record = json.loads(Image.open(answer).text["instructgie"])
    wanted = {"instruction": "maybe night view looks better", "unified": "make it night", "seed": 3}
    wanted |= {"input": "wide.png", "prompt_pair": ["before.png", "after.png"], "steps": 4}
    wanted |= {"guidance_text": 1.0, "guidance_visual": 1.0, "scheduler": "ddim", "model": "toy"}
    assert record == wanted | {"dtype": "float32", "device": "cpu"}
    before, after, query = (load_image(path) for path in (BEFORE, AFTER, wide))
    options = {"generator": seeded([3]), "num_inference_steps": 4, "unify": False}
    options |= {"guidance_scale": 1.0, "visual_guidance_scale": 1.0}
    again = pipe("make it night", query, (before, after), **options).images[0]
    answer = load_image(answer)
    assert np.array_equal(np.asarray(again), np.asarray(answer))
    sheet = labelled_grid((before, after), query, answer, record["instruction"], 64)
    shown = np.asarray(load_image(grid))
    assert np.array_equal(shown, np.asarray(sheet))
    corners = (20, 0), (20, 192), (232, 192)
    for (y, x), picture in zip(corners, (before, after, answer)):
        panel = np.asarray(Image.fromarray(shown[y : y + 192 : 3, x : x + 192 : 3]).crop((0, 0, 64, 64)))
        top = (64 - picture.height) // 2
        assert np.array_equal(panel[top : top + picture.height], np.asarray(picture))


def test_an_example_may_be_absent(editor):
    *_, answer, grid, _ = edit(editor, before=None, after=None, instruction="make it night")[-1]
    assert json.loads(Image.open(answer).text["instructgie"])["prompt_pair"] == []
    assert Image.open(grid).getpixel((96, 96)) == (128, 128, 128)


def test_the_page_says_where_an_instruction_is_cut(editor, monkeypatch):
    said = []
    monkeypatch.setattr(app.gr, "Warning", said.append)
    monkeypatch.setattr(editor.pipe, "unify", lambda texts: texts)
    edit(editor, instruction="make it night", steps=1)
    assert said == []
    edit(editor, instruction=f"{'make it night ' * 25}& add <b>", steps=1)
    (line,) = said
    assert "reads 64 tokens" in line and line.endswith("add &lt;b&gt;&quot;")


def test_the_page_says_where_an_example_is_of_two_frames(editor, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(app.gr, "Warning", said.append)
    Image.new("RGB", (60, 30)).save(tmp_path / "wide.png")
    made = edit(editor, after=str(tmp_path / "wide.png"), steps=1)[-1][-1]
    (line,) = said
    assert "60 × 30 pixels" in line
    assert [picture.size for picture in (*made[0], made[1])] == [(64, 64), (64, 32), (64, 64)]  # kept small


def test_of_many_steps_ten_are_shown(editor):
    _, steps, *_ = edit(editor, steps=25)[-1]
    assert [caption for _, caption in steps] == ["3", "6", "9", "12", "15", "18", "21", "24", "25"]


@pytest.mark.parametrize("scheduler", backbone.SAMPLERS)
def test_every_sampler_shows_its_steps_whichever_came_before(editor, scheduler):
    if scheduler == "euler-a":  # diffusers has it for no U-Net that predicts x_0, as the toy one does
        assert "prediction_type not implemented yet: sample" in error(editor, scheduler=scheduler).message
        return
    shown = edit(editor, scheduler=scheduler, steps=3)
    assert len(shown[-1][1]) == 3 and shown[-1][2]
    assert type(editor.pipe.scheduler).__name__ == backbone.SAMPLERS[scheduler]


def test_stopped_an_edit_ends_after_the_step_in_hand_and_the_next_one_is_whole(editor):
    """Gradio closes it so where Stop is pressed, or the page is closed."""
    going = editor.edit(*wish(steps=100))
    next(going), next(going)
    going.close()
    assert edit(editor)[-1][2]
    assert len(list(editor.folder.glob("*/step_*"))) < 10 + 2


def test_under_the_hood_is_the_edit_that_stands_on_the_page(editor):
    *_, answer, _, made = edit(editor, instruction="maybe night view looks better")[-1]
    pair = load_image(BEFORE), load_image(AFTER)
    wanted = app.Hood({}, 64).draw(pair, load_image(INPUT), load_image(answer), "make it night")
    assert np.array_equal(np.asarray(editor.look(made)), np.asarray(wanted))
    *_, made = edit(editor, before=None, after=None, instruction="make it night")[-1]
    assert not np.array_equal(np.asarray(editor.look(made)), np.asarray(wanted))
    with pytest.raises(gr.Error, match="edit a picture first"):
        editor.look(None)


# ------------------------------------------------------------------------------------------- errors


def error(editor, **changes):
    with pytest.raises(gr.Error) as raised:
        edit(editor, **changes)
    return raised.value


ERRORS = [
    ({"query": None}, "give a picture to edit"),
    ({"before": None}, "an example is two pictures: give before and after, or neither"),
    ({"before": None, "after": None}, "nothing says which edit to make"),
    ({"before": None, "after": None, "instruction": "  "}, "nothing says which edit to make"),
    ({"seed": None}, "give a seed"),
    ({"steps": 2000}, "the number of steps must be 1 … 1000, not 2000"),
    ({"query": "BROKEN"}, "broken.png: corrupt or truncated picture"),
    ({"before": "TEXT"}, "text.png: not a picture that is read here (PNG, JPEG, WEBP, GIF, BMP, TIFF)"),
    ({"after": "LARGE"}, "large.png: more than 1,000,000 pixels"),
    ({"after": "MISSING"}, "missing.png: no such file"),
]


def test_an_error_is_one_line_without_our_paths_and_the_page_goes_on(editor, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    (tmp_path / "broken.png").write_bytes(Path(INPUT).read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (1001, 1000)).save(tmp_path / "large.png")
    files = {name.upper(): str(tmp_path / f"{name}.png") for name in ("broken", "text", "large", "missing")}
    for changes, message in ERRORS:
        raised = error(editor, **{name: files.get(value, value) for name, value in changes.items()})
        assert message in raised.message and "\n" not in raised.message
        assert str(tmp_path) not in raised.message and not raised.print_exception
    assert edit(editor)[-1][2]


def test_a_message_is_no_html(editor, tmp_path):
    name = "<img src=x onerror=alert(1)>.png"
    raised = error(editor, query=str(tmp_path / name))
    assert raised.message == f"{html.escape(name)}: no such file"


def test_what_nobody_expected_is_told_on_the_terminal_alone(editor, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("/a/secret/path")

    monkeypatch.setattr(editor.pipe, "sample", fail)
    raised = error(editor)
    assert raised.message == "RuntimeError: the server's terminal says more" and raised.print_exception
    monkeypatch.undo()
    assert edit(editor)[-1][2]


# ------------------------------------------------------------------------------------------- the page


def test_gradio_decodes_no_file_of_a_stranger(editor, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    calls = app.build(editor, []).fns.values()
    places = [block for call in calls for block in call.inputs if isinstance(block, gr.Image)]
    assert {place.label for place in places} == {"Example before", "Example after", "Input"}
    for place in places:
        assert place.preprocess(ImageData(path=str(broken))) == str(broken) and place.preprocess(None) is None


def test_the_examples_can_be_edited(editor, tmp_path):
    rows = app.toy_examples(tmp_path)
    for row in rows:
        given = dict(zip(("before", "after", "query", "instruction"), row))
        assert edit(editor, **given)[-1][2]
    assert len(rows) == 3


@pytest.fixture(autouse=True)
def no_litter(tmp_path, monkeypatch):
    """Gradio's blocks and its client put pictures into the folder for temporary files, and leave them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


# ------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "options, message",
    [
        (("--port", "0"), "--port must be 1 … 65535, not 0"),
        (("--model", "nowhere/at/all"), "nowhere/at/all: no such folder"),
        (("--device", "abacus"), "--device abacus: no such device here"),
    ],
)
def test_an_error_at_the_start_is_one_line(monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["apps.page", *options])
    with pytest.raises(SystemExit) as exit:
        app.main()
    errors = capsys.readouterr().err
    assert exit.value.code == 2 and errors.startswith("apps.page: error: ") and message in errors
    assert errors.count("\n") == 1


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page in a process of its own → its address."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "apps.page", "--device", "cpu", "--port", str(port)]
    (folder / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "temporary"), "PYTHONPATH": str(backbone.HERE)}
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
        environment.pop(name, None)
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        for _ in range(6000):  # a busy machine imports for minutes
            listens = f"http://127.0.0.1:{port}/" in (folder / "log").read_text()
            if listens or process.poll() is not None:
                break
            time.sleep(0.1)
        assert listens, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        process.wait(300)
    assert not [path for path in (folder / "temporary").rglob("*") if path.is_file()]  # uploads and answers
    told = (folder / "log").read_text()  # Gradio's own words to `test_the_disk_is_not_served`, and no others
    assert told.count("Traceback") == told.count("\ngradio.exceptions.InvalidPathError: Cannot move")
    assert sorted(path.name for path in folder.iterdir()) == ["log", "temporary"]


def test_it_listens_on_this_machine_alone(server):
    port = int(server.split(":")[-1])
    assert httpx.get(server).status_code == 200
    with pytest.raises(OSError):  # another address of this machine, which 0.0.0.0 would answer
        socket.create_connection(("127.0.0.2", port), timeout=5)


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(server):
    command = [sys.executable, "-m", "apps.page", "--port", server.split(":")[-1]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("apps.page: error: Cannot find empty port in range: ")


@pytest.mark.parametrize(
    "path", ["/etc/hosts", app.__file__, BEFORE, "../../../../etc/hosts", str(Path.home())]
)
def test_the_disk_is_not_served(server, path):
    assert httpx.get(f"{server}/gradio_api/file={path}").status_code in (403, 404)
    given = [{"path": path, "meta": {"_type": "gradio.FileData"}}] * 2
    given += [given[0], "make it night", 0, 1, 1, 1, "ddim"]
    event = httpx.post(f"{server}/gradio_api/call/edit", json={"data": given}).json()["event_id"]
    assert httpx.get(f"{server}/gradio_api/call/edit/{event}", timeout=60).text.startswith("event: error")


def test_a_large_upload_is_refused(server):
    for size, status in ((20 * 2**20 - 1000, 200), (20 * 2**20 + 1000, 413)):
        sent = httpx.post(f"{server}/gradio_api/upload", files={"files": ("a.png", b"\0" * size)})
        assert sent.status_code == status


def test_by_gradio_client(server, tmp_path):
    client = Client(server, verbose=False)
    settings = 5, 2, 1.0, 1.0, "ddim"

    def ask(before):
        job = client.submit(
            handle_file(before), handle_file(AFTER), handle_file(INPUT), "", *settings, api_name="/edit"
        )
        shown = list(job)
        job.result()  # raises what the server has raised
        return shown

    _, steps, answer, *_ = ask(BEFORE)[-1]
    assert len(steps) == 2
    answer = Image.open(answer)
    assert json.loads(answer.text["instructgie"])["seed"] == 5
    right, numbers = doctor.judge(answer, score.Truth(doctor.SCENE, doctor.EDIT))
    assert right, numbers
    Image.new("1", (5001, 5000)).save(tmp_path / "large.png")
    with pytest.raises(AppError) as raised:
        ask(tmp_path / "large.png")
    assert raised.value.message == "large.png: more than 25,000,000 pixels"


def test_an_edit_that_gradio_cancels_makes_room(server):
    """As the page's Stop does."""
    client = Client(server, verbose=False)
    given = [handle_file(path) for path in (BEFORE, AFTER, INPUT)]
    job = client.submit(*given, "", 0, 100, 1.0, 1.0, "ddim", api_name="/edit")
    while len(job.outputs()) < 2:
        time.sleep(0.02)
    job.cancel()
    assert client.predict(*given, "", 0, 1, 1.0, 1.0, "ddim", api_name="/edit")[2]
    assert len(job.outputs()) < 10


# ------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def page(server):
    """The page in a headless Chromium; in the end nothing on it has failed, or been asked for elsewhere."""
    reason = "no browser is driven: pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    names = "chromium", "chromium-browser", "google-chrome"
    installed = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as driver:
        chromium = installed or driver.chromium.executable_path
        if not Path(chromium).exists():
            pytest.skip(f"none of {', '.join(names)} is here: playwright install chromium")
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
        browser = driver.chromium.launch(executable_path=chromium, args=sandbox)
        page, wrong = browser.new_page(viewport={"width": 1280, "height": 1000}), []
        page.set_default_timeout(120_000)
        playwright.expect.set_options(timeout=120_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda asked: asked.url.startswith((server, "data:", "blob:")) or wrong.append(asked.url),
        )
        page.goto(server)
        yield page
        browser.close()
        assert wrong == []


def place(page, label):
    """The part of the page that has this label."""
    named = page.get_by_test_id("block-label").get_by_text(label, exact=True)
    return page.locator(".block").filter(has=named).last


def drop(page, label, name, content):
    """Drops a file there, and waits until it is shown."""
    data = page.evaluate_handle(
        """([name, text]) => {
            const data = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
            data.items.add(new File([bytes], name, {type: "image/png"}));
            return data;
        }""",
        [name, base64.b64encode(content).decode()],
    )
    there = place(page, label)
    if there.get_by_label("Remove Image").count():
        there.get_by_label("Remove Image").click()
    there.locator("[aria-dropeffect]").first.dispatch_event("drop", {"dataTransfer": data})
    shown(page, label, 1)


def shown(page, label, count):
    from playwright.sync_api import expect

    expect(place(page, label).locator("img")).to_have_count(count)


def pictures(page, label):
    """What is shown there, (H, W, 3) uint8 each, from where the browser has it."""
    sources = place(page, label).locator("img").evaluate_all("images => images.map(image => image.src)")
    files = [io.BytesIO(httpx.get(source).content) for source in sources]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def look(truth, steps, answers, grids):
    """Judges by the renderer what the page shows; the steps are a little less exact."""
    (answer,), (grid,) = answers, grids
    right, numbers = doctor.judge(answer, truth)
    assert right, numbers
    assert np.array_equal(grid[232:424:3, 192:384:3], answer)  # its lower right square
    assert steps and all(truth.score(step)["right"] for step in steps)


def test_the_look_at_the_page_finds_black_pictures(editor):
    _, steps, answer, grid, _ = edit(editor, steps=20)[-1]
    files = [file for file, _ in steps], [answer], [grid]
    steps, answers, grids = ([np.asarray(load_image(file)) for file in place] for place in files)
    truth = score.Truth(doctor.SCENE, doctor.EDIT)
    look(truth, steps, answers, grids)
    black = [[np.zeros_like(picture) for picture in place] for place in (steps, answers, grids)]
    for wrong in (
        [black[0], answers, grids],
        [[*steps[:-1], *black[0][-1:]], answers, grids],
        [[*black[0][:1], *steps[1:]], answers, grids],
        [steps, black[1], black[2]],
        [steps, answers, black[2]],
        [steps, [truth.pictures[0]], grids],
    ):
        with pytest.raises(AssertionError):
            look(truth, *wrong)


def under_the_hood(page):
    """Its four parts, (H, W, 3) uint8 each, from left to right: condition, input, answer, shifts."""
    page.get_by_role("button", name="Show this edit's condition, areas and shifts").click()
    source = page.get_by_alt_text("Condition, areas and shifts").get_attribute("src")
    hooded = np.asarray(Image.open(io.BytesIO(httpx.get(source).content)).convert("RGB"))
    quarter = hooded.shape[1] // 4
    return [hooded[:, i * quarter : (i + 1) * quarter] for i in range(4)]


def panel(part, side):
    """The panel that stands there, (side, side, 3): in its rows and columns most pixels are drawn on."""
    rows, columns = (np.flatnonzero((part < 254).any(-1).mean(axis) > 0.5) for axis in (1, 0))
    box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return np.asarray(Image.fromarray(part).resize((side, side), Image.Resampling.BOX, box)).astype(int)


def coloured(part, colour):
    """How many pixels have about this colour, "#rrggbb"."""
    return (np.abs(part.astype(int) - tuple(bytes.fromhex(colour[1:]))).sum(-1) < 30).sum()


def test_in_a_browser(page, pipe):
    """APP_SCREENSHOT=out/app.png pytest tests/test_app.py -k in_a_browser keeps a picture."""
    from playwright.sync_api import expect

    loaded = []
    page.on("response", lambda response: loaded.append(response.url))
    truth, query = score.Truth(doctor.SCENE, doctor.EDIT), Path(INPUT).read_bytes()
    drop(page, "Example before", "before.png", Path(BEFORE).read_bytes())
    drop(page, "Example after", "after.png", Path(AFTER).read_bytes())
    drop(page, "Input", "input.png", query)
    instruction, unified = (
        page.get_by_label("Instruction", exact=True),
        page.get_by_label("Instruction, unified"),
    )
    go = page.get_by_role("button", name="Edit", exact=True)
    instruction.fill("could the background be turquoise?")
    go.click()
    for label, count in (("Answer", 1), ("Steps", 10), ("Grid", 1)):
        shown(page, label, count)
    expect(unified).to_have_value("make the background turquoise")
    look(truth, *(pictures(page, label) for label in ("Steps", "Answer", "Grid")))
    drawn = [url for url in loaded if url.endswith(("_0.png", "_0_grid.png")) or "/step_" in url]
    before_the_answer = drawn[: next(i for i, url in enumerate(drawn) if url.endswith("_0.png"))]
    assert len({httpx.get(url).content for url in before_the_answer}) >= 2  # the steps, as they came
    grid = place(page, "Grid").locator("img").first
    assert grid.evaluate("grid => [grid.naturalWidth, grid.naturalHeight]") == [384, 444]

    page.get_by_role("button", name="Under the hood").click()
    names = ["Instruction, unified", "Condition", "Areas", "Shifts", "Steps"]
    rows = page.locator("li", has=page.locator("strong"))
    expect(rows).to_have_count(len(names))
    told = rows.all_inner_texts()
    assert [line.split(" (")[0] for line in told] == names and all(line.endswith(".") for line in told)
    condition, *areas, shifts = under_the_hood(page)
    before, after = (np.asarray(load_image(path)) for path in (BEFORE, AFTER))
    panels = [before, after, np.asarray(load_image(INPUT)), np.full_like(before, 128)]
    wanted = np.vstack([np.hstack(panels[:2]), np.hstack(panels[2:])])
    assert np.abs(panel(condition, 128) - wanted).mean() < 10
    for area, picture in zip(areas, (panels[2], *pictures(page, "Answer"))):
        assert np.abs(panel(area, 64) - picture).mean() < 10
        assert coloured(area, TINT) == 0  # no face, no area
    assert coloured(shifts, INK) > 100 and coloured(shifts, TINT) > 100  # the edit's arrow, and the example's
    if os.environ.get("APP_SCREENSHOT"):
        page.screenshot(path=os.environ["APP_SCREENSHOT"], full_page=True)

    with page.expect_download() as download:
        place(page, "Answer").get_by_label("Download").click()
    answer = Image.open(download.value.path())
    assert doctor.judge(answer, truth)[0]
    assert (download.value.suggested_filename, answer.format, answer.size) == ("input_0.png", "PNG", (64, 64))
    assert json.loads(answer.text["instructgie"])["unified"] == "make the background turquoise"

    drop(page, "Input", "broken.png", query[:300])
    go.click()
    message = page.get_by_test_id("toast-body")
    expect(message).to_contain_text("broken.png: corrupt or truncated picture (image file is truncated)")
    assert "Traceback" not in page.content()

    drop(page, "Input", "again.png", Path(BEFORE).read_bytes())
    markup = 'make it night <img src=x onerror="document.title = 1">'
    instruction.fill(markup)
    go.click()
    expect(unified).to_have_value(pipe.unify([markup])[0])
    expect(page.get_by_alt_text("Condition, areas and shifts")).to_have_count(0)  # of the edit before
    shown(page, "Answer", 1)
    assert page.title() == "InstructGIE"
    assert all(coloured(area, TINT) > 50 for area in under_the_hood(page)[1:3])  # its face is framed
