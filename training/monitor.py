"""Moving averages of the losses, and which steps are not to be taken."""

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class LossMonitor:
    """Moving averages of the losses, and whether a step is sound.

    [ours] A step whose gradient is no number, or whose loss is above 100 times its average, is not learnt
    from; `LIMIT` of them in a row are the end.
    """

    LIMIT = 20

    def __init__(self) -> None:
        self.averages: dict[str, Tensor] = {}
        self.skipped, self.in_a_row = 0, 0
        self.pending: list[dict[str, Tensor]] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        """Losses by name, the one that is minimised first; of a step, or of one of its parts."""
        self.pending.append({name: value.detach() for name, value in losses.items()})

    def is_sound(self, norm: Tensor) -> bool:
        """Whether the step whose losses were added since the last call is sound. norm: of its gradient.

        Asking waits for the device. Only the losses of sound steps enter the averages.
        """
        seen, self.pending = self.pending, []
        sound = norm.isfinite()
        for losses in seen:
            name, loss = next(iter(losses.items()))
            usual = self.averages.get(name, loss).to(loss).abs()
            sound = sound & loss.isfinite() & (loss <= 100 * usual)
        if not sound:
            self.skipped += 1
            self.in_a_row += 1
            return False
        self.in_a_row = 0
        for losses in seen:
            for name, value in losses.items():
                self.averages[name] = torch.lerp(self.averages.get(name, value).to(value), value, 0.05)
        return True

    @property
    def gave_up(self) -> bool:
        return self.in_a_row >= self.LIMIT

    def check(self, way: str) -> None:
        """Raises ValueError where too many steps in a row were not sound. way: what to do then."""
        if self.gave_up:
            raise ValueError(f"{self.in_a_row} steps in a row were no numbers or exploded; {way}")

    def write(self, log: SummaryWriter, step: int) -> None:
        """To TensorBoard, as training/curve.py reads it."""
        for name, value in self.averages.items():
            log.add_scalar(f"loss/{name}", value, step)

    def text(self) -> dict[str, str]:
        shown = {name: f"{value:.4f}" for name, value in self.averages.items()}
        return shown | ({"skipped": str(self.skipped)} if self.skipped else {})

    def state_dict(self) -> dict[str, Tensor]:
        counts = {"skipped": torch.tensor(self.skipped)}
        return {f"average/{name}": value for name, value in self.averages.items()} | counts

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.skipped = int(state["skipped"])
        self.averages = {k.removeprefix("average/"): v for k, v in state.items() if k != "skipped"}
