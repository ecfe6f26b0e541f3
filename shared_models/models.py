"""What a model of the zoo declares, and the registry that `@model("name", ...)` fills from one file per model.

::

    vit, settings = configure("vit", {"size": "tiny", "patch": 4})  # the row of `tiny`, then the keys given beside it
    module = vit.build(settings, (3, 32, 32), 10)  # (B, 3, 32, 32) float32 -> (B, 10)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from shared_models.errors import ConfigError, UnknownNameError
from shared_models.job_parts import Form
from shared_models.registry import Registry, nearest
from shared_models.validation import validate

Shape = tuple[int, ...]
Builder = Callable[..., nn.Module]  # (settings, shape, outputs), and each=True where that is wanted
FORMS: dict[Form, tuple[str, ...]] = {
    "image": ("C", "H", "W"),
    "features": ("F,",),
    "tokens": ("T", "V"),
    "series": ("T", "C"),
    "image-text": ("C", "H", "W", "T", "V"),
}
WORDS: dict[Form, str] = {
    "image": "an image",
    "features": "features",
    "tokens": "a text in tokens",
    "series": "a series",
    "image-text": "an image with a text",
}


class ModelSettings(BaseModel):
    """Base of a model's own settings: the keys of the job's `[model]` part, an unknown one is an error.

    `size` picks a row of the model's `sizes`; a setting given beside it wins over that row. A setting that every row
    gives has no default of its own, so `configure` (not the class itself) is the way to make one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    size: str = "tiny"


@dataclass(frozen=True)
class Model:
    """One family of the zoo.

    Attributes:
        name: how a job asks for it.
        builder: the decorated function behind `build`.
        settings: the pydantic model of its keys in `[model]`.
        sizes: size -> the settings that size stands for.
        tasks: the tasks it can serve.
        paper: where it comes from.
        stackable: whether its parameters may be stacked and run under `torch.func.vmap`.
        inputs: what one example may be, with the shape it is built for: an image (C, H, W), a row of features (F,), the
            tokens of a text (T, V) of a vocabulary of V, a series (T, C), or an image with a text (C, H, W, T, V).
        per_sample_gradients: how DP-SGD may get per-sample gradients, soundest first; none: only client-level privacy.
        heads: patterns of the state-dict entries that belong to the job's labels, e.g. for personal heads; a job
            writes `@head` for them.
        proposals: whether it needs regions from outside (`Batch.proposals`).
        renames: (pattern, replacement) pairs, regular expressions that turn the keys of published weights into ours.
        family: models that solve one problem in different ways; the card shows them side by side.
        notes: what a person who chooses should know, a sentence or two.
        usual: an example's usual shape at a size, for measuring; `tiny` has to be there.
    """

    name: str
    builder: Builder
    settings: type[ModelSettings]
    sizes: Mapping[str, Mapping[str, Any]]
    tasks: tuple[str, ...]
    paper: str
    stackable: bool = True
    inputs: tuple[Form, ...] = ("image",)
    per_sample_gradients: tuple[str, ...] = ("vmap", "hooks", "loop")
    heads: tuple[str, ...] = ("head.*",)
    proposals: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    family: str = ""
    notes: str = ""
    usual: Mapping[str, Shape] = field(default_factory=lambda: {"tiny": (3, 32, 32)})

    def unit(self, settings: ModelSettings) -> Literal["sample", "batch"]:
        """`batch` where samples see each other inside the model: batch normalisation in training."""
        return "batch" if getattr(settings, "norm", "") == "batch" else "sample"

    @property
    def privacy(self) -> tuple[str, ...]:
        """Units that differential privacy can protect with this model: `sample` and `client`, or `client` alone."""
        return ("sample", "client") if self.per_sample_gradients else ("client",)

    def require(self, shape: Shape) -> None:
        """Raise a ConfigError where an example of that shape is nothing that the model takes."""
        if not any(len(shape) == len(FORMS[i]) for i in self.inputs) or min(shape) < 1:
            takes = " or ".join(f"{WORDS[i]} ({', '.join(FORMS[i])})" for i in self.inputs)
            raise ConfigError(f"model '{self.name}' cannot take an example of shape {shape}", hint=f"It takes {takes}")

    def build(self, settings: ModelSettings, shape: Shape, outputs: int, *, each: bool = False) -> nn.Module:
        """The module, initialised from torch's global generator (the caller seeds it) and from nothing else.

        Args:
            settings: from `configure`.
            shape: of one example, as `inputs` says.
            outputs: numbers per example, e.g. classes.
            each: whether they are wanted for every position of a text or series; the builder is then asked with it.

        Returns:
            A module whose forward maps (B, *shape) float32, or tokens (B, T) int64, to what the task takes: (B,
            outputs) for classification and localization, (B, outputs, H, W) for segmentation, (B, T, outputs) for every
            position; detectors follow `shared_models.detection`.

        Raises:
            ConfigError: this model cannot take such an example, or these settings do not fit its size.
        """
        self.require(shape)
        if outputs < 1:
            raise ConfigError(f"model '{self.name}' needs at least one output, not {outputs}")
        return self.builder(settings, shape, outputs, **({"each": True} if each else {}))


models: Registry[Model] = Registry("model", "shared_models.zoo")


def model(
    name: str, *, settings: type[ModelSettings], sizes: Mapping[str, Mapping[str, Any]], paper: str, **declared: Any
) -> Callable[[Builder], Builder]:
    """Decorator that registers a build function as model `name`; `declared` are further fields of `Model`."""

    def add(builder: Builder) -> Builder:
        declared.setdefault("tasks", ("classification",))
        models.register(name)(
            Model(name=name, builder=builder, settings=settings, sizes=sizes, paper=paper, **declared)
        )
        return builder

    return add


def configure(name: str, keys: Mapping[str, Any], where: str = "[model]") -> tuple[Model, ModelSettings]:
    """Model `name` and its complete settings: the row of the size, then `keys`, which win.

    Args:
        name: of the model.
        keys: what a job's `[model]` part says beside the name.
        where: the place to name in the message.

    Raises:
        UnknownNameError: no such model, or the model has no such size.
        ConfigError: an unknown key or a value that cannot be.
    """
    chosen = models.get(name, where)
    size = keys.get("size", chosen.settings.model_fields["size"].default)
    if not isinstance(size, str) or size not in chosen.sizes:
        raise UnknownNameError(f"{where}: model '{name}' has no size {size!r}", hint=nearest("", list(chosen.sizes)))
    return chosen, validate(chosen.settings, {**chosen.sizes[size], **keys}, f"{where} {name}")
