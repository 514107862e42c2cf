"""The command ``squamata``: registers the verbs, and turns whatever a user caused into one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from squamata import __version__
from squamata.cli import (
    chat,
    convert,
    demo,
    evaluate,
    generate,
    hardware,
    inspect,
    outliers,
    profile,
    quantize,
    recipes,
    report,
    sensitivity,
    study,
)
from squamata.cli.output import give_up_stdout, prepare_streams, why_unprinted
from squamata.errors import SquamataError

USER_ERROR = 2
INTERRUPTED = 130

UsageError = typer.BadParameter.__bases__[0]  # of whichever click this typer brings

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("quantize")(quantize.quantize)
app.command("convert")(convert.convert)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("inspect")(inspect.inspect)
app.command("profile")(profile.profile)
app.command("hardware")(hardware.hardware)
app.command("demo")(demo.demo)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("outliers")(outliers.outliers)
app.command("report")(report.report)
app.add_typer(recipes.app, name="recipes")
app.add_typer(study.app, name="study")


@app.callback(invoke_without_command=True)
def squamata(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Quantize Mamba-family language models, run them fast on any machine, and study what that costs.

    MODEL and SOURCE: a folder, a hub name (state-spaces/mamba2-130m), or 'bundled', the small model in the package.

    Start with: squamata demo
    """
    if version:
        typer.echo(f"squamata {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 after an error that the user can put right, 130."""
    command = typer.main.get_command(app)
    try:
        status = command.main(arguments and list(arguments), prog_name="squamata", standalone_mode=False)
    except SquamataError as error:
        return _fail(str(error), USER_ERROR)
    except UsageError as error:  # type: ignore[misc]
        context = getattr(error, "ctx", None)
        said = error.format_message().replace("Value error, ", "").rstrip(".")  # type: ignore[attr-defined]
        return _fail(f"{said}; see {context.command_path if context else 'squamata'} --help", USER_ERROR)
    except (BrokenPipeError, SystemExit):  # the reader of a pipe has seen enough; rich exits, when it shows the help
        give_up_stdout()
        return 0
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    if reason := why_unprinted():
        return _fail(f"cannot write to standard output: {reason}", USER_ERROR)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    with suppress(OSError):  # a log on a full disk
        typer.echo("squamata: " + " ".join(message.split()), err=True)
    return status


def run() -> None:
    """Entry point of the installed command."""
    prepare_streams()
    sys.exit(main())
