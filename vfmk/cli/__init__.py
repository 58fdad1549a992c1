"""The command `vfmk`. Each subcommand only reads its arguments and prints what came back."""

try:
    import typer
except ImportError as error:
    raise SystemExit(f"vfmk: {error}; the commands need: pip install vfmk[cli]") from None

from vfmk.cli.apply import apply
from vfmk.cli.demo import demo
from vfmk.cli.eval import eval
from vfmk.cli.export import export
from vfmk.cli.info import info
from vfmk.cli.search import search
from vfmk.cli.train import train

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(info)
app.command()(demo)
app.command()(search)
app.command()(apply)
app.command()(train)
app.command()(eval)
app.command()(export)
