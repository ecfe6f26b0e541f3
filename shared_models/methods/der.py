"""Dark experience replay: Buzzega et al. 2020, "Dark Experience for General Continual Learning: a Strong, Simple
Baseline".

    DER     L = L_ce(new) + alpha mean ||z - f(x)||^2 / C                               equation 5
    DER++   the same + beta L_ce(other old examples)                                    equation 6

z are the outputs that the model gave when the example was kept, f(x) those of now, C the number of outputs: as in the
authors' code the square is a mean over the outputs.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from shared_models.methods.base import Method, ReplaySettings, Tensors, method
from shared_models.sums import Groups
from shared_models.tasks.base import Batch


class DarkSettings(ReplaySettings):
    """`alpha` >= 0: weight of what the model said before."""

    alpha: Annotated[float, Field(ge=0)] = 0.3


class DarkPlusSettings(DarkSettings):
    """`alpha` as for `der`; `beta` >= 0: weight of the kept labels."""

    alpha: Annotated[float, Field(ge=0)] = 0.1
    beta: Annotated[float, Field(ge=0)] = 0.5


@method("der")
class Dark(Method):
    """Old examples are to be answered as they were."""

    Settings: ClassVar[type[DarkSettings]] = DarkSettings
    continual = True
    draws = 1
    keeps_outputs = True
    settings: DarkSettings

    def loss(self, values: Tensor, params: Tensors, batch: Batch, outputs: Tensor, round_state: Groups) -> Tensor:
        """Per example what its draw stands for, times the draw's weight."""
        if batch.past is None or batch.past.outputs is None:
            return values
        apart = (outputs.float() - batch.past.outputs).square().mean(dim=1)
        drawn = batch.past.draw
        values = torch.where(drawn == 1, self.settings.alpha * apart, values)
        return torch.where(drawn == 2, self.labelled * values, values) * batch.past.scale

    @property
    def labelled(self) -> float:
        """The weight of a second draw's labels; there is none here."""
        return 0.0


@method("der++")
class DarkPlus(Dark):
    """Other old examples are also to be answered rightly."""

    Settings = DarkPlusSettings
    draws = 2
    settings: DarkPlusSettings

    @property
    def labelled(self) -> float:
        """beta."""
        return self.settings.beta
