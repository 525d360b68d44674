"""Mask annealing under Transformers' `Trainer`: `MaskAnnealingCallback` sets the probabilities after every step.

Without it, a model that `Trainer` trains keeps its masked attention for ever, and is slow and tied to its masks at
inference. `EoMTTrainer`, in trainer_support.py, has it built in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .annealing import POWER, MaskAnnealing


class MaskAnnealingCallback(TrainerCallback):
    """Anneals masked attention over the steps that `Trainer` takes in all, also after it was resumed.

    The probabilities live in the model's config, so that every checkpoint has those of its step. They are 0 when the
    training is over; where it was stopped early, they stay what they were. Evaluation before the last phase ends
    measures a model that still masks, so let the best model be chosen after that (`finished` tells).

    Args:
        phases: (start, end) per query layer as fractions of training; `None` places them by the official rule.
        power: of the fall in between.
    """

    def __init__(self, phases: Sequence[Sequence[Any]] | None = None, power: float = POWER) -> None:
        self.phases, self.power = phases, power
        self.schedule: MaskAnnealing | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Place the phases, now that the number of steps is known.

        Raises:
            ValueError: the model is none whose attention can be annealed, or has another number of query layers.
        """
        config: Any = getattr(_unwrapped(model), "config", None)
        if not hasattr(config, "masked_attention_probabilities"):
            raise ValueError(
                f"{type(_unwrapped(model)).__name__} has no masked attention to anneal; train an "
                "EoMTForUniversalSegmentation (from_pretrained reads Transformers' own checkpoints), or leave the "
                "callback out"
            )
        if self.phases is None:
            self.schedule = MaskAnnealing.by_rule(state.max_steps, config.num_query_layers, self.power)
        elif len(self.phases) != config.num_query_layers:
            raise ValueError(
                f"annealing has {len(self.phases)} phases, and the model {config.num_query_layers} query layers; give "
                "one (start, end) for each"
            )
        else:
            self.schedule = MaskAnnealing.from_fractions(self.phases, state.max_steps, self.power)
        self._set(model, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Set the probabilities of the next step, before the model is evaluated or saved."""
        self._set(model, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the probabilities to the record of training losses."""
        if self.schedule is None or logs is None or "loss" not in logs:
            return
        values = self.record(state.global_step)
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def finished(self, step: int) -> bool:
        """Whether nothing is masked any more after a number of steps."""
        return self.schedule is not None and self.schedule.finished(step)

    def record(self, step: int) -> dict[str, float]:
        """The probabilities by name, for logs."""
        probabilities = [] if self.schedule is None else self.schedule.probabilities(step)
        return {f"masked_attention_{layer}": probability for layer, probability in enumerate(probabilities)}

    def _set(self, model: Any, step: int) -> None:
        if self.schedule is not None:
            _unwrapped(model).set_masked_attention_probabilities(self.schedule.probabilities(step))


def _unwrapped(model: Any) -> Any:
    """The model inside those of DistributedDataParallel, `torch.compile` and PEFT."""
    while True:
        for name in ("_orig_mod", "module"):
            if name in getattr(model, "_modules", {}):
                model = getattr(model, name)
                break
        else:
            return model.get_base_model() if hasattr(model, "get_base_model") else model
