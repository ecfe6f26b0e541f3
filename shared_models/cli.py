"""`fedzoo models` and `fedzoo doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import typer

app = typer.Typer()
zoo = typer.Typer(name="models", invoke_without_command=True)
app.add_typer(zoo)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]
Task = Annotated[str, typer.Option(help="Only models that can serve this task.")]


@zoo.callback()
def models(context: typer.Context, task: Task = "", as_json: Json = False) -> None:
    """List the zoo by task: models, their sizes and papers. `fedzoo models show NAME` prints the card of one."""
    if context.invoked_subcommand:
        if task or as_json:
            raise typer.BadParameter(f"put options behind '{context.invoked_subcommand}'", context)
        return
    from shared_models.models import models
    from shared_models.tasks.base import tasks

    if task:
        tasks[task]  # an unknown name is an error
    rows: list[dict[str, Any]] = [
        {
            "model": name,
            "sizes": list(models[name].sizes),
            "tasks": list(models[name].tasks),
            "settings": [key for key in models[name].settings.model_fields if key != "size"],
            "paper": models[name].paper,
            "family": models[name].family,
            "notes": models[name].notes,
            "inputs": list(models[name].inputs),
            "proposals": models[name].proposals,
            "heads": list(models[name].heads),
            "stackable": models[name].stackable,
            "privacy": list(models[name].privacy),
            "per_sample_gradients": list(models[name].per_sample_gradients),
        }
        for name in models
        if not task or task in models[name].tasks
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max((len(row["model"]) for row in rows), default=0)
    for served in [task] if task else sorted({name for row in rows for name in row["tasks"]}):
        typer.echo(served)
        for row in rows:
            if served in row["tasks"]:
                typer.echo(f"  {row['model']:{width}}  {', '.join(row['sizes'])}")
                typer.echo(f"  {'':{width}}  {row['paper']}")


@zoo.command()
def show(
    name: Annotated[str, typer.Argument(help="A model of the zoo.")],
    size: Annotated[str, typer.Option(help="The size that is measured.")] = "tiny",
    task: Annotated[str, typer.Option(help="The task that it is measured on.", show_default="its first")] = "",
    shape: Annotated[
        str, typer.Option(metavar="C,H,W", help="Of one example, or F features.", show_default="the size's usual")
    ] = "",
    classes: Annotated[int, typer.Option(min=1, help="How many labels.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = 32,
    weights: Annotated[
        str,
        typer.Option(metavar="FILE", help="Weights to load, below $FEDZOO_WEIGHTS or here; says what of them fits."),
    ] = "",
    as_json: Json = False,
) -> None:
    """The card of one model: what it is, and what one size of it costs on this machine."""
    from shared_models.card import make_card

    try:
        sides = tuple(int(part) for part in shape.split(",")) if shape else ()
    except ValueError:
        raise typer.BadParameter(f"--shape {shape!r} is not of the form C,H,W or F.") from None
    card = make_card(name, size=size, task=task, shape=sides, classes=classes, batch=batch, weights=weights)
    for line in [json.dumps(card, indent=2)] if as_json else card_lines(card):
        typer.echo(line)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this installation: versions, devices, and whether everything that fedzoo starts is there."""
    from shared_models.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([vars(f) for f in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{'ok   ' if finding.ok else 'WRONG'} {finding.what}: {finding.detail}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def card_lines(card: dict[str, Any]) -> Iterator[str]:
    """A card of `shared_models.card` as text."""
    cost, family = card["measured"], card["family"]
    batches = f"{cost['classes']} classes, batches of {cost['batch']}"
    yield f"{card['model']}: {card['paper']}"
    if card["notes"]:
        yield f"  {card['notes']}"
    yield from _table(
        [
            ("tasks", ", ".join(card["tasks"])),
            ("inputs", " or ".join(card["inputs"]) + (" with proposed regions" if card["proposals"] else "")),
            ("unit", card["unit"]),
            (
                "privacy",
                f"{' or '.join(card['privacy'])} (per-sample gradients: {_words(card['per_sample_gradients'])})",
            ),
            ("stackable", "yes" if card["stackable"] else "no"),
            ("@head", _words(card["heads"])),
        ]
    )
    yield f"\nsizes: parameters with {cost['classes']} classes at the usual shape"
    yield from _table((row["size"], f"{row['parameters']:>13,}", _by(row["shape"])) for row in card["sizes"])
    if card["settings"]:
        yield f"\nsettings of {cost['size']}"
        yield from _table((name, _words(value)) for name, value in card["settings"].items())
    yield (
        f"\nmeasured here: {cost['size']}, {cost['task']}, {_by(cost['shape'])}, {batches}; "
        f"{cost['device']}, threads: {cost['threads']}, torch {cost['torch']}"
    )
    yield from _table(
        [
            ("parameters", f"{cost['parameters']:,}"),
            ("sent", f"{_mb(cost['payload_bytes'])} MB each way, per site and round"),
            ("fingerprint", cost["fingerprint"]),
            ("training step", f"{_ms(cost['step_seconds'])} ms"),
            ("inference", f"{_ms(cost['inference_seconds'])} ms"),
            ("memory of a step", f"{_mb(cost['memory_bytes'])} MB ({cost['memory']})"),
        ]
    )
    if cost["weights"]:
        yield f"  {cost['weights']}"
    if family["members"]:
        yield f"\nfamily '{family['name']}' side by side: tiny, {cost['task']}, {_by(family['shape'])}, {batches}"
        heading = ("", "parameters", "ms a step", "ms inference", "MB", "")
        yield from _table([heading, *map(_member, family["members"])])


def _member(row: dict[str, Any]) -> tuple[str, ...]:
    if row["refused"]:
        return row["model"], row["refused"]
    times = _ms(row["step_seconds"]), _ms(row["inference_seconds"])
    return row["model"], f"{row['parameters']:,}", *times, _mb(row["memory_bytes"]), row["notes"]


def _table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Rows of words as lines with aligned columns; the last word of a row takes the room it needs."""
    rows = list(rows)
    widths: dict[int, int] = {}
    for row in rows:
        for i, word in enumerate(row[:-1]):
            widths[i] = max(widths.get(i, 0), len(word))
    for row in rows:
        yield "  ".join(["", *(word.ljust(widths[i]) for i, word in enumerate(row[:-1])), row[-1]]).rstrip()


def _by(shape: list[int]) -> str:
    return "x".join(map(str, shape)) if len(shape) > 1 else f"{shape[0]} features"


def _words(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _mb(count: int) -> str:
    return f"{count / 1e6:.3g}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"
