"""The model as it is trained, and as a single process can run it.

`build_trained_model` has it built by its task and adds frozen parts and adapters; `compile_blocks` and
`checkpoint_blocks` change how its blocks run; `WholeModel` is the same model where the trained one is sharded over
processes.
"""

from __future__ import annotations

from typing import Any

from ..models.modeling_plain_vit import PlainViTLayer
from .adapters import add_adapters
from .distributed_state import is_sharded, whole
from .freezing import freeze
from .tasks import TrainingTask


def build_trained_model(task: TrainingTask) -> tuple[Any, Any]:
    """The model of a task and its image processor, ready for an optimiser.

    Raises:
        ValueError: recipe, data, checkpoint or adapters do not go together.
    """
    model, processor = task.build_model()
    freeze(model, task.recipe.freeze)
    if task.recipe.lora is not None:
        model = add_adapters(model, task.recipe.lora)
    return model, processor


def compile_blocks(model: Any) -> None:
    """Compile the repeated blocks in place: a fraction of the time that the whole model takes, and about as fast.

    What changes from step to step, such as annealing, stays outside, so that nothing is compiled again for it.
    """
    repeated = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in repeated:
            # Modules of a class share their graphs, and after a second size PyTorch makes one graph for any size. Only
            # the blocks of the ViT want that, since queries and prompts change their length. The others depend on the
            # size of the image, and PyTorch 2.14 fails where that is open: in the backward pass of resampled positions
            # and in the channels-last convolution of the scale layers, each of which sees a size of its own. Sizes
            # beyond PyTorch's limit, eight graphs, run uncompiled.
            module.compile(dynamic=None if isinstance(module, PlainViTLayer) else False)


def checkpoint_blocks(model: Any) -> None:
    """Have the activations of every block computed again in the backward pass, instead of kept."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its new name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


class WholeModel:
    """A model whose weights may be sharded, as each process can run it on its own: scoring is not done in step.

    Args:
        task: builds the copy, which is kept for the next time.
    """

    def __init__(self, task: TrainingTask) -> None:
        self.task = task
        self._copy: Any = None

    def of(self, model: Any) -> Any:
        """The model itself where it is whole, else a copy with its weights; then all processes have to call."""
        if not is_sharded(model):
            return model
        if self._copy is None:
            self._copy, _ = build_trained_model(self.task)
        self._copy.load_state_dict(whole(model.state_dict()))
        return self._copy
