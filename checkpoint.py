"""What keeps a run from losing anything: files and checkpoints that are whole or not there at all, steps that
are sound or not taken, ends that are asked for.

Checkpoints are safetensors and JSON alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

# --- Files --------------------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` makes the file under another name, which becomes `path` when it is done. Raises OSError, also
    for what safetensors makes of one."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `path` when all is written, and only then.

    What a killed process has left of such folders is cleared away. Raises OSError, also for what safetensors
    makes of one, and ValueError for weights that are not finite, and then leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (no dict)
                    if not weights.get_tensor(name).isfinite().all():
                        raise ValueError(f"NaN or infinity in {name}: {path} is not written")
        for file in temporary.rglob("*"):  # in the file system before its name is, should the power fail
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder to this process while it is entered; its threads and workers have no lock of their own.

    The operating system holds the lock, and drops it when the process ends, however that ends. Where the file
    system knows no locks there is none. Raises ValueError where another process holds it, and OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as file:
        try:
            _lock(file.fileno())
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                reason = "another process writes there; wait for its end, or give another --output"
                raise ValueError(f"{folder}: {reason}") from None
        yield


def _lock(file: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:  # not flock, which a loader's worker would share, and keep when its parent is killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def other_settings(path: Path, settings: dict[str, Any], anew: bool = False) -> dict[str, tuple[Any, Any]]:
    """Notes settings beside the work they are of, unless some are there (`anew`: even then); returns those
    that differ from what is there, as name → (there, now). Raises ValueError where that holds no settings."""
    settings = json.loads(json.dumps(settings))
    if anew or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write_text(json.dumps(settings, indent=2) + "\n"))
    try:
        there = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: holds no settings ({error}); remove its folder, or give another") from None
    pairs = {name: (there.get(name), settings.get(name)) for name in {**settings, **there}}
    return {name: (one, other) for name, (one, other) in pairs.items() if one != other}


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's weights, for `update_parameters(model)` after each step.

    The decay grows to its final value as (1 + n) / (10 + n): the first weights, which are random or zero,
    would otherwise stay in the average for 1 / (1 - decay) steps.
    """

    def update(average: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = int(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(average, current, weight)

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update))


# --- Checkpoints --------------------------------------------------------------------------------------------


class Stateful(Protocol):
    """A module, or anything else that tells its state in tensors and takes it back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def save_checkpoint(
    folder: Path,
    step: int,
    modules: dict[str, Stateful],
    *optimizers: torch.optim.Optimizer,
    keep: int,
) -> None:
    """Writes `folder/checkpoint-STEP` whole or not at all, then deletes all but the newest `keep`.

    Safetensors only: weights under their module's name, the n-th optimiser's state under
    `optimizer/<n>/<index>/<name>`, one name more where it is nested, as bitsandbytes has it. Raises OSError
    where the disk takes no more, and ValueError for what is not finite; older checkpoints are then all there.
    """
    tensors = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for n, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                parts = {f"/{k}": v for k, v in value.items()} if isinstance(value, dict) else {"": value}
                tensors |= {f"optimizer/{n}/{i}/{name}{k}": torch.as_tensor(v) for k, v in parts.items()}
    for k, v in tensors.items():
        tensors[k] = v.detach().cpu().clone(memory_format=torch.contiguous_format)
    with whole_folder(folder / f"checkpoint-{step:07d}") as new:
        save_file(tensors, new / "state.safetensors")
        record = {"step": step, "sha256": _digest(new / "state.safetensors")}
        (new / "step.json").write_text(json.dumps(record))
    for old in sorted(folder.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified(checkpoint: Path) -> tuple[int, dict[str, Tensor]] | None:
    """The step and the tensors of a checkpoint; None for one that is cut, damaged or empty."""
    try:
        record = json.loads((checkpoint / "step.json").read_text())
        path = checkpoint / "state.safetensors"
        return (record["step"], load_file(path)) if record["sha256"] == _digest(path) else None
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return None


def load_checkpoint(folder: Path, modules: dict[str, Stateful], *optimizers: torch.optim.Optimizer) -> int:
    """Loads the newest checkpoint of `folder` that verifies, in place; returns its step, 0 if there is none.

    One that does not verify is named, and the one before it taken. Raises ValueError where none does, and
    where what it holds is of other modules.
    """
    checkpoints = sorted(folder.glob("checkpoint-*"), reverse=True)
    for checkpoint in checkpoints:
        if found := verified(checkpoint):
            break
        print(f"{checkpoint} is damaged; the one before it is taken", flush=True)
    else:
        if checkpoints:
            raise ValueError(f"{folder}: every checkpoint is damaged; start anew in another folder")
        return 0
    step, tensors = found
    states: dict[int, dict[int, dict]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, n, i, *above, name = key.split("/")
            state = states.setdefault(int(n), {}).setdefault(int(i), {})
            for group in above:
                state = state.setdefault(group, {})
            is_count = value.ndim == 0 and not value.is_floating_point()
            state[name] = value.item() if is_count else value
    try:
        for name, module in modules.items():
            prefix = f"{name}/"
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        for n, optimizer in enumerate(optimizers):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states.get(n, {}), "param_groups": groups})
    except (RuntimeError, ValueError, KeyError):
        raise ValueError(
            f"{checkpoint}: of another architecture; resume with the settings it began with"
        ) from None
    return step


# --- Steps --------------------------------------------------------------------------------------------------


class Watch:
    """Moving averages of the losses, and whether a step is sound.

    Choice: a step whose gradient is no number, or whose loss is above `explosion` times its average, is not
    learnt from; `limit` of them in a row are the end.
    """

    def __init__(self, limit: int = 20, explosion: float = 100.0) -> None:
        self.limit, self.explosion = limit, explosion
        self.averages: dict[str, Tensor] = {}
        self.skipped, self.in_a_row = 0, 0
        self.pending: list[dict[str, Tensor]] = []

    def see(self, losses: dict[str, Tensor]) -> None:
        """Losses by name, the one that is minimised first; of a step, or of one of its parts."""
        self.pending.append({name: value.detach() for name, value in losses.items()})

    def is_sound(self, norm: Tensor) -> bool:
        """Of the step whose losses were seen since the last call. norm: of its gradient.

        To ask is to wait for the device. Only the losses of sound steps enter the averages.
        """
        seen, self.pending = self.pending, []
        sound = norm.isfinite()
        for losses in seen:
            name, loss = next(iter(losses.items()))
            usual = self.averages.get(name, loss).to(loss).abs()
            sound = sound & loss.isfinite() & (loss <= self.explosion * usual)
        if not (is_sound := bool(sound)):
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            return False
        self.in_a_row = 0
        for losses in seen:
            for name, value in losses.items():
                self.averages[name] = torch.lerp(self.averages.get(name, value).to(value), value, 0.05)
        return is_sound

    @property
    def is_over(self) -> bool:
        return self.in_a_row >= self.limit

    def check(self) -> None:
        """Raises ValueError where too many steps in a row were not sound."""
        if self.is_over:
            way = "try --resume with a lower --lr or with --precision no"
            raise ValueError(f"{self.in_a_row} steps in a row were no numbers or exploded; {way}")

    def text(self) -> dict[str, str]:
        shown = {name: f"{value:.4f}" for name, value in self.averages.items()}
        return shown | ({"skipped": str(self.skipped)} if self.skipped else {})

    def state_dict(self) -> dict[str, Tensor]:
        counts = {"skipped": torch.tensor(self.skipped)}
        return {f"average/{name}": value for name, value in self.averages.items()} | counts

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.skipped = int(state.get("skipped", 0))
        self.averages = {k.removeprefix("average/"): v for k, v in state.items() if k != "skipped"}


# --- Ends ---------------------------------------------------------------------------------------------------


class Stop:
    """Ctrl-C and SIGTERM while it is entered: `asked` is to be looked at after each step.

    Before the first step (until `at_work` is set), and asked twice, they end the program at once. Exit codes
    are a shell's, 130 and 143.
    """

    def __init__(self) -> None:
        self.asked, self.at_work = 0, False

    def __enter__(self) -> Stop:
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: object) -> None:
        if self.asked or not self.at_work:
            os._exit(128 + number)  # an exception may get lost: it is raised wherever the program just is
        self.asked = number
        _say(f"\n{signal.Signals(number).name}: ends after this step; again, and it ends at once")

    def agree(self, accelerator: Any) -> None:
        """What one of several processes is asked, all are: no one may wait for another that has gone."""
        if accelerator is not None and accelerator.num_processes > 1:
            asked = torch.tensor([self.asked], device=accelerator.device)
            self.asked = int(accelerator.gather(asked).max())

    def end(self, saved: str) -> None:
        """saved: after what the run can be taken up again."""
        _say(f"stopped; --resume goes on after {saved}")
        raise SystemExit(128 + self.asked)


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError:
        # Ctrl-C at a terminal ends a `tee` first. Python would print again at its end, and exit with 120.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def begin_worker(worker: int) -> None:
    """`worker_init_fn` of a loader's processes: a terminal sends Ctrl-C to all, and the first one decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
