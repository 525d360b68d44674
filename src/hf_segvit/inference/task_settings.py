"""What a model can be asked for: its tasks, and the settings that fit a task."""

from collections.abc import Sequence
from typing import Any

from ..models.confidence import Confidence, confidences_named
from ..models.configuration_vit_p import ViTPConfig
from ..models.image_processing_eomt import TASKS
from .loading import checkpoint_type, load_image_processor, quiet_transformers
from .views import Views


def served_task(processor: Any, task: str | None = None) -> str:
    """The task asked for, or by default the one that the checkpoint was trained for; impossible ones are refused."""
    served = [name for name in TASKS if hasattr(processor, f"post_process_{name}_segmentation")]
    if task is None:
        return getattr(processor, "task", served[0])
    if task not in served:
        raise ValueError(
            f"this checkpoint was trained for {getattr(processor, 'task', 'another task')} segmentation and cannot do "
            f"task {task!r}; it can do {', '.join(served)}"
        )
    return task


def task_of_checkpoint(source: str, wanted: Sequence[str] = TASKS, *, revision: str | None = None) -> str:
    """The task of a checkpoint without loading its weights: "points" for a ViT-P, else its own.

    Where `wanted`, the tasks of a data set, lacks its own, it is the first of them that the checkpoint serves.
    """
    model_type = checkpoint_type(source, revision)
    if model_type == ViTPConfig.model_type:
        return "points"
    with quiet_transformers():
        processor = load_image_processor(source, model_type, revision)
    served = [task for task in wanted if hasattr(processor, f"post_process_{task}_segmentation")]
    own = served_task(processor)
    return own if own in wanted or not served else served[0]


def refuse_views(task: str, views: Views) -> None:
    """Refuse several views for tasks other than semantic, whose segments cannot be averaged."""
    if not views.is_plain and task != "semantic":
        raise ValueError(
            f"several views (scales {list(views.scales)}, flip={views.flip}) can be averaged for semantic segmentation "
            f"only, not for {task}; ask for task='semantic', or leave them out"
        )


def refuse_threshold(task: str, threshold: float | None) -> None:
    """Refuse a threshold that is not a probability, or that the task has no use for."""
    if threshold is None:
        return
    if task == "semantic":
        raise ValueError(f"threshold={threshold}: in semantic segmentation every pixel has a class; leave it out")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} is outside [0, 1]")


def checked_confidence(task: str, confidence: str | Confidence | None, views: Views) -> Confidence | None:
    """The confidence of a name; refused for tasks other than semantic, and where it is not defined."""
    if confidence is None:
        return None
    wanted, *more = confidences_named(confidence)
    if more:
        raise ValueError(
            f"confidence={[str(each) for each in (wanted, *more)]}: an answer has one confidence; "
            "Segmenter.confidences gives several at once"
        )
    if task != "semantic":
        raise ValueError(
            f"confidence={str(wanted)!r}: the confidence of pixels is that of semantic segmentation, not of {task}, "
            "whose segments have scores of their own; ask for task='semantic', which the model must serve"
        )
    if wanted.name == "rejection" and not views.is_plain:
        raise ValueError(
            "confidence='rejection' is about queries, which several views do not share; leave the views out, or choose "
            "another confidence"
        )
    return wanted


def refuse_max_segments(task: str, max_segments: int | None) -> None:
    """Refuse a limit below 1, or for a task that has none."""
    if max_segments is None:
        return
    if task != "instance":
        raise ValueError(
            f"max_segments={max_segments} is for instance segmentation; {task} segmentation shows every segment that "
            "there is, so leave it out"
        )
    if max_segments < 1:
        raise ValueError(f"max_segments={max_segments} must be at least 1")
