"""The progress of a training as HTML."""

from __future__ import annotations

from aoft_demo.actions.train import TrainingProgress
from aoft_demo.views.charts import Line, lines
from aoft_demo.views.parts import facts

__all__ = ["training_card"]


def training_card(progress: TrainingProgress) -> str:
    """Accuracy after each epoch as curves, and the latest figures."""
    points = list(enumerate(progress.lines, 1))
    train = [(float(i), float(line["train_accuracy"])) for i, line in points]
    val = [(float(i), float(line["val_accuracy"])) for i, line in points]
    chart = lines(
        [Line("training pictures", train, 2), Line("validation pictures", val, 1)],
        x=(1, max(progress.epochs, 2)),
        y=(0, 1),
        x_label="epoch",
        y_label="Accuracy",
        percent=True,
        integers=True,
    )
    shown = [f"<b>{len(points)}</b> of {progress.epochs} epochs"]
    if val:
        shown.append(f"best validation accuracy <b>{max(v for _, v in val):.1%}</b>")
    if progress.test is not None:
        shown.append(f'test accuracy <b data-test="{progress.test:.6f}">{progress.test:.1%}</b>')
    return facts(*shown, f"{progress.seconds:.0f} s") + chart
