"""`[stream]`: what comes one after the other when `time = "continual"`, and all at once when it is offline."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shared_models.job_parts import Part, Positive

Site = Annotated[str, Field(min_length=1)]


class StreamPart(Part):
    """`[stream]`: the tasks, and when each site trains on which.

    Attributes:
        kind: `classes` cuts the labels, in their order, into tasks (class-incremental). `sites` makes tasks of the
            sites: those of the first group are there from the start, those of the others join in the task of their
            group (domain-incremental, the domain is the hospital). The others deal the examples to tasks by their names
            and change the images of each task more than those of the task before (domain-incremental,
            `client.streams`): `rotation`, `blur`, `drift` of a scanner.
        tasks: T; as many as `sites` has groups, where it is given.
        amount: the change in the last task, in what its kind is measured in; the first task's images are as they are.
        sites: T groups of sites by their names, for `kind = "sites"` and `order = "rotated"`. A simulation deals its
            sites in their order to T groups where this is empty; a server knows only who is enrolled and needs it.
        stay: of `kind = "sites"`: sites that have joined go on training; else they train in their own task alone.
        order: `shared`: all sites are at the same task in the same round. `rotated`: in period p of the rounds the
            sites of group g are at task (p + g) mod T.
    """

    kind: Literal["classes", "sites", "rotation", "blur", "drift"] = "classes"
    tasks: Positive = 5
    amount: Annotated[float, Field(gt=0)] | None = None
    sites: tuple[tuple[Site, ...], ...] = ()
    stay: bool = False
    order: Literal["shared", "rotated"] = "shared"

    @model_validator(mode="before")
    @classmethod
    def _as_many_tasks_as_groups(cls, data: Any) -> Any:
        if isinstance(data, dict) and "tasks" not in data and isinstance(data.get("sites"), list | tuple):
            return {**data, **({"tasks": len(data["sites"])} if data["sites"] else {})}
        return data

    @model_validator(mode="after")
    def _one_schedule(self) -> StreamPart:
        if self.kind == "sites" and self.order == "rotated":
            raise ValueError("order = 'rotated' turns tasks that every site has, and of kind = 'sites' each has one")
        if self.kind == "sites" and self.amount is not None:
            raise ValueError("amount is a change of images, and kind = 'sites' changes none")
        if self.kind != "sites" and self.stay:
            raise ValueError(f"stay belongs to kind = 'sites'; with kind = '{self.kind}' every site stays")
        if self.sites and not self.by_site:
            raise ValueError(f"sites means nothing with kind = '{self.kind}' and order = 'shared'")
        if self.sites and len(self.sites) != self.tasks:
            raise ValueError(f"sites has {len(self.sites)} groups for {self.tasks} tasks; give as many, or no tasks")
        if self.kind == "sites" and () in self.sites:
            raise ValueError(f"group {self.sites.index(())} of sites is empty: nobody would train in that task")
        names = [name for group in self.sites for name in group]
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), ""):
            raise ValueError(f"the site '{twice}' stands twice in sites")
        return self

    @property
    def by_site(self) -> bool:
        """Whether it differs from site to site what is trained on in a round."""
        return self.kind == "sites" or self.order == "rotated"

    @cached_property
    def groups(self) -> Mapping[str, int]:
        """Site -> its group, of those that are named."""
        return {name: index for index, group in enumerate(self.sites) for name in group}
