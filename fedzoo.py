"""The `fedzoo` command: mounts each package's own commands. Nothing heavy is imported until it is used."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import click
import typer

PACKAGES = ("shared_models", "client", "server", "simulations")
INTERRUPTED = 130  # the shell's code for Ctrl-C; typer returns it when a command is interrupted


def require_one_place() -> None:
    """The package names are generic: stop where one of them is found elsewhere than beside this file."""
    here = Path(__file__).resolve().parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != here:
            where = f"was found in {found}" if found else "was not found"
            sys.exit(
                f"error: the package '{name}' {where}, but fedzoo is in {here}. "
                "Another distribution or a folder on PYTHONPATH has taken its name; use a fresh virtual environment"
            )


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"fedzoo {version('fedzoo')}")
        raise typer.Exit


def build_app() -> typer.Typer:
    """The whole command tree."""
    import client.cli
    import server.cli
    import server.run_cli
    import shared_models.cli
    import simulations.attacks.cli
    import simulations.cli

    app = typer.Typer(
        help="Federated learning for hospitals and edge fleets: one program, three dials, any model of the zoo.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
        ] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
    ) -> None:
        """Federated learning for hospitals and edge fleets."""

    app.add_typer(simulations.cli.app)
    app.add_typer(simulations.attacks.cli.app)
    app.add_typer(shared_models.cli.app)
    app.add_typer(server.cli.app)
    app.add_typer(client.cli.app)
    app.add_typer(server.run_cli.app)
    return app


def main(argv: list[str] | None = None) -> None:
    """Run one command; every error a user can cause ends in one line and a non-zero exit."""
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a refused handshake is said once, by us
    require_one_place()
    from shared_models.errors import FedzooError

    try:
        code = build_app()([w for w in words if w != "--debug"], prog_name="fedzoo", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command = context.command_path if context else "fedzoo"
        typer.echo(f"error: {error.format_message()} See: {command} --help", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        sys.exit(1)
    except FedzooError as error:
        if debug:
            raise
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        if debug:
            raise
        sys.exit(f"error: the module '{error.name}' is not installed. Add it with: pip install 'fedzoo[simulations]'")
    except Exception as error:
        if debug:
            raise
        reason = " ".join(str(error).split())
        sys.exit(f"internal error: {type(error).__name__}: {reason}. Repeat with --debug for the traceback")
    if code == INTERRUPTED:
        typer.echo("interrupted", err=True)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
