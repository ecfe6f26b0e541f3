"""What a person reads when a setting cannot be: one line, every problem, the path of each key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from shared_models.errors import ConfigError
from shared_models.validation import validate


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Circle(Strict):
    kind: Literal["circle"]
    radius: float


class Square(Strict):
    kind: Literal["square"]
    side: float


class Pen(Strict):
    color: str = "black"
    line_width: int = Field(1, alias="line-width", ge=1)


class Drawing(Strict):
    title: str
    pen: Pen | None = None
    shapes: tuple[Annotated[Circle | Square, Field(discriminator="kind")], ...] = ()

    @field_validator("title")
    @classmethod
    def _printable(cls, title: str) -> str:
        if not title.isprintable():
            raise ValueError("should be printable")
        return title


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"title": "a", "pan": {}}, "unknown key 'pan', did you mean 'pen'?"),
        ({"title": "a", "zzzz": 1}, "unknown key 'zzzz', known: pen, shapes, title"),
        ({"title": "a", "pen": {"colour": "red"}}, "unknown key 'pen.colour', did you mean 'color'?"),
        ({"title": "a", "pen": {"linewidth": 2}}, "unknown key 'pen.linewidth', did you mean 'line-width'?"),
        (
            {"title": "a", "shapes": [{"kind": "circle", "radius": 1, "radios": 2}]},
            "unknown key 'shapes.0.circle.radios', did you mean 'radius'?",
        ),
        ({"title": "a", "pen": {"line-width": 0}}, "'pen.line-width' should be greater than or equal to 1, not 0"),
        ({}, "'title' is missing"),
        ({"title": "a\n"}, "'title': should be printable"),
        ({"title": 7, "pn": 1}, "'title' should be a valid string, not 7; unknown key 'pn', did you mean 'pen'?"),
        ({"title": ["x" * 100]}, f"'title' should be a valid string, not ['{'x' * 58}…"),
    ],
)
def test_one_line_says_where_and_what(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(Drawing, data, "job.toml")
    assert str(error.value) == f"job.toml: {message}"
    assert error.value.__cause__ is None
    assert error.value.__context__ is None  # no pydantic traceback follows


def test_good_data_becomes_the_settings() -> None:
    drawing = validate(Drawing, {"title": "a", "pen": {"line-width": 3}}, "job.toml")
    assert drawing == Drawing(title="a", pen=Pen(**{"line-width": 3}))
