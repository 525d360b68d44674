"""A callback: training ends once the loss is low enough, after a last evaluation."""

from transformers import TrainerCallback


class StopAtLoss(TrainerCallback):
    """Looks at what the loop records; `Trainer` calls it in the same way."""

    def __init__(self, loss: float = 0.5):
        self.loss, self.seen = loss, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.seen.append((state.global_step, logs["loss"]))
            control.should_training_stop = logs["loss"] < self.loss
