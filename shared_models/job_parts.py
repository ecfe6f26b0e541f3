"""The tables of a job, each with its defaults and what it cannot be; `shared_models.job` makes one job of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Place = Literal["centralized", "isolated", "federated"]
Time = Literal["offline", "continual"]
Form = Literal["image", "features", "tokens", "series", "image-text"]
Positive = Annotated[int, Field(gt=0)]


class Part(BaseModel):
    """One table of the job; an unknown key is an error, and so is a number that JSON cannot carry."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Choice(BaseModel):
    """A registered name and the settings that belong to it, checked by the thing itself when the job is resolved."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def keys(self) -> dict[str, Any]:
        """The settings beside the name."""
        return dict(self.model_extra or {})


class TaskPart(Choice):
    """`[task]`: the loss, the metric and the label list that fixes every class index."""

    name: str = "classification"
    labels: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> TaskPart:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a label stands twice in the list")
        return self


class DataPart(Part):
    """`[data]`: the preprocessing all sites share.

    Images become float32 (C, H, W), `(x / 255 - mean) / std`; features float32 (F,) and series float32 (T, C),
    `(x - mean) / std`; texts become the ids of their tokens, (T,) int64, a shorter one padded.

    Attributes:
        shape: (C, H, W) with C = 1 (grey) or 3 (colour); (F,): as many as `features`; (T, C): T steps of C numbers;
            (T,), with a `tokenizer`: tokens of a text at most.
        tokenizer: `bytes`, or a file of the library `tokenizers` (JSON), whose content becomes part of the job.
        cut: what an example of a text file is: one of its `lines`, one of its `windows` of as many tokens as `shape`
            says, or `roles`: windows of all that a role of a play says.
        text_length: tokens of the text that goes with an image, at most; 2 or more, for `<begin>` is one of them.
        captions: how many of an image's texts are read, in their order; each is an example, with a copy of the image.
            Validation and test hold the first alone.
        text: columns of a table that hold a text, joined by a space.
        stride: steps from the start of one window of a long series to that of the next; 0: as many as a window has, so
            that none overlap. Each window is a copy in memory.
        resize: how an image of another size gets to H x W: `stretch` it, or `pad` it to its longer side first. Masks
            and boxes follow.
        tile: (height, width) in an image's own pixels: it and its mask are cut into tiles of that size before they are
            resized, and every tile is an example. What reaches beyond the edge is black and counts nowhere. The tiles
            of one image stay together, at one site and in one part. Empty: whole images.
        mean: one number per channel or feature, or one for all.
        std: the same.
        normalise_by: `job`: the two above; `sites`: both are measured over the sites' training examples, in a round
            before the first in which each site answers with sums and a count.
        parts: how examples are cut into train, validation and test where their owner has not: by a `hash` of each
            name, or in `blocks` of their order (slices of one volume, where a neighbour would give a test image away).
        train_share: share of the train part that is used; chosen by the names, so that a larger share holds a smaller
            one, and tiles of one image stay together. To learn from few labels; the other two parts are whole.
        features: columns of a table, in order; `"cp=3"` is 1 where column cp holds 3, else 0.
        target: the column that holds the class.
        missing: of a row that lacks a feature: `drop` it, or put the `mean` (after normalisation: 0).
        proposals: regions of each image for models that need them from outside (R-CNN and its kin), best first.
    """

    shape: tuple[Positive, ...]
    resize: Literal["stretch", "pad"] = "stretch"
    tile: tuple[Positive, Positive] | tuple[()] = ()
    mean: tuple[float, ...] = (0.5,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    normalise_by: Literal["job", "sites"] = "job"
    parts: Literal["hash", "blocks"] = "hash"
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    tokenizer: str = ""
    cut: Literal["lines", "windows", "roles"] = "lines"
    text_length: Annotated[int, Field(ge=2)] = 64
    captions: Positive = 1
    text: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    features: tuple[str, ...] = ()
    stride: Annotated[int, Field(ge=0)] = 0
    target: str = "label"
    missing: Literal["drop", "mean"] = "drop"
    proposals: Positive = 300

    @field_validator("shape")
    @classmethod
    def _image_or_features(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) not in (1, 2, 3):
            raise ValueError(
                f"should be (C, H, W) of an image, (T, C) of a series, or (F,) of features or tokens, not {len(shape)} "
                "numbers"
            )
        if len(shape) == 3 and shape[0] not in (1, 3):
            raise ValueError(f"an image has 1 (grey) or 3 (colour) channels, not {shape[0]}")
        return shape

    @model_validator(mode="after")
    def _per_channel(self) -> DataPart:
        if self.normalise_by == "sites" and (self.mean, self.std) != ((0.5,), (0.5,)):
            raise ValueError("mean and std are measured where normalise_by = 'sites'; leave them out")
        if self.form == "tokens":
            if (self.mean, self.std, self.normalise_by) != ((0.5,), (0.5,), "job"):
                raise ValueError("tokens are not normalised; leave mean, std and normalise_by out")
            if len(self.shape) != 1 or self.shape[0] < 2:
                raise ValueError("shape of a text is one number, of at least 2 tokens")
        elif not {len(self.mean), len(self.std)} <= {1, self.channels}:
            raise ValueError(f"mean and std need one number, or one per channel or feature ({self.channels})")
        if self.form == "features" and len(self.features) != self.shape[0]:
            raise ValueError(f"shape says {self.shape[0]} features and the list 'features' names {len(self.features)}")
        if self.form == "series" and self.features and len(self.features) != self.shape[1]:
            raise ValueError(f"shape says {self.shape[1]} numbers a step and 'features' names {len(self.features)}")
        if self.stride and self.form != "series":
            raise ValueError("stride belongs to a series, whose shape is two numbers, e.g. shape = [96, 7]")
        if 0 < self.stride < self.shape[0] and self.parts == "hash":
            raise ValueError(
                f"windows of {self.shape[0]} steps, one every {self.stride}, overlap, and parts = 'hash' would put the "
                "same steps into train and test; parts = 'blocks' cuts in time"
            )
        if self.form not in ("features", "series") and self.features:
            raise ValueError("'features' belongs to a table, whose shape is one number, e.g. shape = [13]")
        return self

    @property
    def form(self) -> Form:
        """What an example is."""
        if self.tokenizer:
            return "image-text" if len(self.shape) == 3 else "tokens"
        forms: dict[int, Form] = {1: "features", 2: "series", 3: "image"}
        return forms[len(self.shape)]

    @property
    def channels(self) -> int:
        """How many numbers `mean` and `std` have at most: channels, features, or numbers of a step."""
        return self.shape[-1] if self.form == "series" else self.shape[0]

    @property
    def sample(self) -> tuple[int, ...]:
        """What a model is built for (`shared_models.models.FORMS`): with the vocabulary where there are tokens."""
        if not self.tokenizer:
            return self.shape
        from shared_models.tokens import make_tokenizer

        size = make_tokenizer(self.tokenizer).size
        return (*self.shape, self.text_length, size) if self.form == "image-text" else (*self.shape, size)


class WeightsPart(Part):
    """`[weights]`: where the model starts from, instead of random numbers.

    Attributes:
        file: a file (safetensors, torch) or a Hugging Face folder, below the folder that the environment variable
            FEDZOO_WEIGHTS names; without it, a node's own `weights/`, elsewhere the current folder. Never a hub, and
            nothing outside. A node needs it where `[share]` keeps something.
        sha256: of the file; another file is refused. Of a folder: of its weights file.
        rename: (pattern, replacement) pairs, regular expressions that turn its keys into the model's, after the
            model's own.
    """

    file: str = ""
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    rename: tuple[tuple[str, str], ...] = ()

    @field_validator("file")
    @classmethod
    def _below_the_folder(cls, file: str) -> str:
        if file.startswith("/") or ".." in file.split("/"):
            raise ValueError(
                f"'{file}' should be a name below the folder of weights, without a leading '/' and '..'; "
                "the environment variable FEDZOO_WEIGHTS says which folder that is"
            )
        return file


class SharePart(Part):
    """`[share]`: patterns (fnmatch on state-dict keys) of entries that are not averaged over sites.

    `@head` stands for the patterns of the model's head, and a leading `!` turns a pattern round: `base = ["!@head"]`
    trains heads only.

    Attributes:
        personal: stay on the node and are trained there; only their names are known elsewhere.
        base: are not sent and not trained; both sides hold them, covered by hash.
    """

    personal: tuple[str, ...] = ()
    base: tuple[str, ...] = ()


class LoraPart(Part):
    """`[lora]`: low-rank adapters beside linear layers (`shared_models.lora`); all else but the head stays as it is.

    Attributes:
        rank: of the product that is learned; 0: no adapters.
        alpha: the product is multiplied by `alpha / rank`.
        targets: patterns of layers' names; empty: every linear layer but the head's.
        train: `b`, the second factor, of which the mean is exact and about half as much is sent; or `both` factors, of
            which the server averages the product and keeps what fits the rank.
    """

    rank: Annotated[int, Field(ge=0)] = 0
    alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: tuple[str, ...] = ()
    train: Literal["b", "both"] = "b"

    @model_validator(mode="after")
    def _needs_a_rank(self) -> LoraPart:
        if self.train == "both" and not self.rank:
            raise ValueError("train = 'both' trains the factors of adapters, and rank 0 has none: set rank")
        return self


class TrainPart(Part):
    """`[train]`: one site's work in one round.

    Attributes:
        epochs: passes over the local data a round; `steps` replaces it by a fixed number of optimizer steps.
        schedule: of the learning rate over all rounds; it does not restart with a round.
        warmup: share of all rounds in which the rate rises linearly from zero.
        clip: largest L2 norm of a step's gradient; a larger one is scaled down to it. 0 is none.
        accumulate: parts in which a batch is computed, their gradients added: less memory, the same step.
        precision: `bf16` computes the forward pass in bfloat16 where torch deems it safe (autocast); slow on a CPU.
        deterministic: one thread per operation and deterministic kernels, so that the same job gives the same bits.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Positive = 32
    accumulate: Positive = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    epochs: Annotated[float, Field(gt=0)] = 1.0
    steps: Positive | None = None
    deterministic: bool = True


class PrivacyPart(Part):
    """`[privacy]`: (epsilon, delta) differential privacy; neighbours differ by one unit that is added or removed.

    Attributes:
        mode: the unit: one training example (`sample`: DP-SGD at the sites) or all of a site (`client`: its update is
            clipped). `none`: no guarantee.
        epsilon: target of the whole run, from which the noise is found; 0: `noise` is given instead.
        delta: of the guarantee; well below 1 / units.
        noise: noise multiplier sigma: the noise's standard deviation is sigma times the clip. 0 gives no guarantee.
        clip: largest L2 norm of one unit's part: of an example's gradient, or of a site's update. 0 is no clip, which
            only `noise = 0` allows.
        accountant: composes the rounds: `rdp` (Renyi orders), or `prv` (privacy loss distributions; tighter, slower).
        sampling: of examples into a step: `poisson`, each on its own with the same probability; `shuffle`, as without
            privacy, only for `noise = 0`.
        gradients: how one example's gradient is found; `auto` takes the soundest that the model declares.
        noise_by: who adds the noise of `client`: the `server`, which then is trusted with the updates, or the
            `clients`, each a share, of which `federation.min_sites` make the whole.
        mechanism: of `client`: `gaussian`, fresh noise in each round, with `federation.fraction` as the probability of
            each site; `ftrl`, noise of a tree (Kairouz et al. 2021), the sites in turn, no sampling assumed.
        quantile: the clip of `client` follows this quantile of the updates' norms, itself learned with noise (Andrew
            et al. 2021); 0: the clip is fixed.
        clip_rate: how fast it follows.
    """

    mode: Literal["none", "sample", "client"] = "none"
    epsilon: Annotated[float, Field(ge=0)] = 0.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    noise: Annotated[float, Field(ge=0)] | None = None
    clip: Annotated[float, Field(ge=0)] = 1.0
    accountant: Literal["rdp", "prv"] = "rdp"
    sampling: Literal["poisson", "shuffle"] = "poisson"
    gradients: Literal["auto", "vmap", "hooks", "loop"] = "auto"
    noise_by: Literal["server", "clients"] = "server"
    mechanism: Literal["gaussian", "ftrl"] = "gaussian"
    quantile: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_rate: Annotated[float, Field(gt=0)] = 0.2

    @model_validator(mode="after")
    def _one_guarantee(self) -> PrivacyPart:
        if self.mode == "none":
            if self.model_fields_set - {"mode"} and self != PrivacyPart():
                raise ValueError(
                    "mode is 'none', and then nothing else may be set; mode = 'sample' or 'client' protects"
                )
            return self
        if (self.epsilon > 0) == (self.noise is not None):
            raise ValueError("needs either epsilon, the target of the whole run, or noise, the multiplier")
        if self.noise != 0 and (self.clip == 0 or self.sampling == "shuffle"):
            what = "clip = 0" if self.clip == 0 else "sampling = 'shuffle'"
            raise ValueError(f"{what} has no guarantee and goes with noise = 0 only")
        foreign = (
            ("noise_by", "mechanism", "quantile", "clip_rate") if self.mode == "sample" else ("sampling", "gradients")
        )
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing in mode '{self.mode}'")
        if self.quantile and self.clip == 0:
            raise ValueError("quantile needs a clip to begin with")
        return self


class AugmentPart(Part):
    """`[augment]`: random changes of training images; masks and boxes move along. Every default is no change.

    Attributes:
        flip: mirror left and right, for half of the images.
        flip_vertical: mirror top and bottom, for half of the images.
        quarter_turns: turn by 0, 90, 180 or 270 degrees; square images only.
        crop: pad all sides by so many pixels and cut the size out again at a random place (Krizhevsky: 4).
        rotate: turn by up to so many degrees either way.
        scale: grow or shrink by up to this share: 0.2 is 0.8 to 1.2.
        brightness: change by up to this share.
        contrast: the same.
    """

    flip: bool = False
    flip_vertical: bool = False
    quarter_turns: bool = False
    crop: Annotated[int, Field(ge=0)] = 0
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return self != AugmentPart()


class FederationPart(Part):
    """`[federation]`: the round loop.

    Attributes:
        rounds: of the whole run, over all tasks of a stream.
        fraction: share of the sites selected a round (C in McMahan et al. 2017), at least one site.
        min_sites: how many willing nodes a start waits for, and how many contributions a round needs (all of the
            cohort where `fraction` makes it smaller).
        wait: seconds a start, or a round that has lost sites, waits for enough willing nodes; a day, for people must
            read and approve.
        round_timeout: seconds the server waits for the answers of one round.
        max_update_norm: largest L2 norm of a site's update; a larger one is rejected.
        select: the model that is tested and kept: of the `last` round, or of the round with the `best` validation.
    """

    rounds: Positive = 10
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_sites: Positive = 1
    wait: Annotated[float, Field(ge=0)] = 86400.0
    round_timeout: Annotated[float, Field(gt=0)] = 3600.0
    max_update_norm: Annotated[float, Field(gt=0)] = 1e6
    select: Literal["last", "best"] = "last"
