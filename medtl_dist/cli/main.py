"""`medtl`: the commands, and how their errors become one message and an exit code."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer

from medtl_dist import __version__
from medtl_dist.cli.audit import audit
from medtl_dist.cli.cluster import app as cluster_app
from medtl_dist.cli.compare import compare
from medtl_dist.cli.crossval import crossval
from medtl_dist.cli.data import app as data_app
from medtl_dist.cli.demo import demo
from medtl_dist.cli.doctor import doctor
from medtl_dist.cli.export import export
from medtl_dist.cli.jobs import list_runs, logs, stop, submit_app
from medtl_dist.cli.k8s import app as k8s_app
from medtl_dist.cli.models import models
from medtl_dist.cli.predict import predict
from medtl_dist.cli.report import report
from medtl_dist.cli.runs import app as runs_app
from medtl_dist.cli.status import status
from medtl_dist.cli.train import evaluate, train
from medtl_dist.cli.tune import tune
from medtl_dist.cli.verify import index, verify
from medtl_dist.errors import MedtlError

# Typer's own since it carries its own Click, that package's before; either way the base of what typer exports.
_UsageError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

app = typer.Typer(
    name="medtl",
    help="Distributed transfer learning for medical image classification.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app.command()(verify)
data_app.command()(index)
data_app.command()(audit)
app.add_typer(data_app, name="data")
app.add_typer(k8s_app, name="k8s")
app.add_typer(runs_app, name="runs")
app.add_typer(submit_app, name="submit")
app.add_typer(cluster_app, name="cluster")
app.command()(train)
app.command()(tune)
app.command()(evaluate)
app.command()(predict)
app.command()(compare)
app.command()(export)
app.command()(crossval)
app.command()(report)
app.command()(status)
app.command()(doctor)
app.command()(logs)
app.command()(stop)
app.command(name="list")(list_runs)
app.command()(demo)
app.command()(models)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and exit.")
) -> None:
    if version:
        typer.echo(f"medtl_dist {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, or what DESIGN's table says of the error it printed."""
    try:
        code = app(args=arguments, prog_name="medtl", standalone_mode=False)
    except MedtlError as error:
        for line in error.message.splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except _UsageError as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone (`medtl … | head`)
        return 0
    except Exception:
        traceback.print_exc()
        print("error: this is a bug of medtl_dist; please report it with the lines above.", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the console script."""
    code = run()
    storage = sys.modules.get("medtl_dist.storage")
    if storage is not None:  # else nothing was imported that could hang in a store
        storage.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
