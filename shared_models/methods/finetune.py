"""Fine-tuning: the next task's data are trained on as they come, nothing is added. The baseline that forgets."""

from __future__ import annotations

from shared_models.methods.base import Method, method


@method("finetune")
class Finetune(Method):
    """A continual method with no piece of its own."""

    continual = True
