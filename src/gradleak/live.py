"""Watching an attack while it runs: logs for TensorBoard, and a figure in a notebook. Both show rebuilt private images."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torchvision.utils import make_grid

from gradleak.errors import OutputError, SpecError
from gradleak.invert import Progress

#: Pictures are logged after round 1, and then when so many times as many rounds are done: often while much changes.
GROWTH = 1.3

#: At most so many images of a batch are shown.
MOST_IMAGES = 64

#: Seconds after which what TensorBoard is to show is on disk.
FLUSH_SECONDS = 5.0


class TensorBoard:
    """A watcher that logs for TensorBoard: ``loss``, ``best loss``, ``learning rate``, and a grid of the best iterate.

    Pictures come at increasing intervals, and with the last round. The position is the round; restarts follow each other.
    The folder is created for its owner alone (0700) if it is not there, at the first round.

    Args:
        folder: Where the logs go: ``tensorboard --logdir FOLDER`` shows them.
        images: Whether to log pictures, which are rebuilt private images.

    Raises:
        SpecError: TensorBoard is not installed.
        OutputError: The folder is a file.
    """

    def __init__(self, folder: Path | str, *, images: bool = True) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as cause:
            raise SpecError(
                f'logs for TensorBoard need TensorBoard ({cause}); install it with: pip install "gradleak[tensorboard]"'
            ) from None
        self.folder, self.images = Path(folder), images
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder}: is a file; expected a folder for TensorBoard's logs")
        self._open: Any = SummaryWriter
        self._writer: Any = None
        self._next_picture = 1

    def __call__(self, progress: Progress) -> None:
        """Log one round."""
        if self._writer is None:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._writer = self._open(self.folder, flush_secs=FLUSH_SECONDS)
        step = progress.restart * progress.rounds + progress.round
        for name, value in (
            ("loss", progress.loss),
            ("best loss", progress.best_loss),
            ("learning rate", progress.learning_rate),
        ):
            self._writer.add_scalar(name, value, step)
        if self.images and (step >= self._next_picture or progress.round == progress.rounds):
            self._writer.add_image("best iterate", picture_grid(progress.images), step)
            self._writer.flush()
            self._next_picture = max(step + 1, math.ceil(GROWTH * step))

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class NotebookFigure:
    """A watcher that draws into a notebook: the matching loss so far, beside the images of the best iterate.

    The figure replaces itself; the progress bar of the attack stands above it.

    Args:
        every_seconds: The shortest time between two drawings; the first and the last round are always drawn.
        width: Of the figure, inches.

    Attributes:
        losses: (position, matching loss) of each round; restarts follow each other.

    Raises:
        SpecError: There is no IPython.
    """

    def __init__(self, *, every_seconds: float = 2.0, width: float = 9.0) -> None:
        try:
            from IPython import display
        except ImportError as cause:
            raise SpecError(f"a figure in a notebook needs IPython ({cause}); run it in a notebook, or leave it out") from None
        self.every_seconds, self.width = every_seconds, width
        self.losses: list[tuple[int, float]] = []
        self._display = display
        self._handle: Any = None
        self._drawn = -math.inf

    def __call__(self, progress: Progress) -> None:
        """Note the round, and draw if it is time."""
        self.losses.append((progress.restart * progress.rounds + progress.round, progress.loss))
        now = time.monotonic()
        if now - self._drawn < self.every_seconds and progress.round != progress.rounds:
            return
        self._drawn = now
        shown = self._display.Image(data=figure_png(self.losses, progress, width=self.width))
        if self._handle is None:
            self._handle = self._display.display(shown, display_id=True)
        else:
            self._handle.update(shown)


def figure_png(losses: list[tuple[int, float]], progress: Progress, *, width: float = 9.0) -> bytes:
    """A PNG: the matching loss over the rounds, logarithmic, beside the present images.

    Args:
        losses: (position, loss), ascending.
        progress: The round to show.
        width: Inches, at 100 dots an inch.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(width, 0.4 * width), dpi=100, layout="constrained")
        curve, pictures = figure.subplots(1, 2)
        points = [(t, loss) for t, loss in losses if loss > 0]
        curve.plot([t for t, _ in points], [loss for _, loss in points], color="#1560a8", linewidth=1.2)
        if points:
            curve.set_yscale("log")
        curve.set_xlabel("round")
        curve.set_title(f"matching loss, least {progress.best_loss:.2e}", fontsize=10, loc="left")
        curve.spines[["top", "right"]].set_visible(False)
        pictures.imshow(picture_grid(progress.images).permute(1, 2, 0).numpy(), interpolation="nearest")
        pictures.set_title(f"best iterate after round {progress.round} of {progress.rounds}", fontsize=10, loc="left")
        pictures.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def picture_grid(images: Tensor) -> Tensor:
    """The first images of a batch in one picture, 3 x H' x W' in [0, 1], on the CPU.

    Args:
        images: B x C x H x W; of three channels or more the first three are shown as colours, else the first as grey.
    """
    shown = images[:MOST_IMAGES, : 3 if images.shape[1] >= 3 else 1].detach().float().cpu()
    columns = math.ceil(math.sqrt(len(shown)))
    return make_grid(shown.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1), nrow=columns, padding=1, pad_value=1.0)
