"""Experience replay (ER): Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning".

In every step examples that the site keeps of the past join the batch, as if they were new. What is kept is drawn by
reservoir sampling, so that each example seen so far is there with the same probability.
"""

from __future__ import annotations

from shared_models.methods.base import Method, ReplaySettings, method


@method("er")
class ExperienceReplay(Method):
    """The loss is the mean over new and old examples together."""

    Settings = ReplaySettings
    continual = True
    draws = 1
