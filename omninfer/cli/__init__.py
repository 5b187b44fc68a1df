"""`omni run` and `omni chat`: options and nothing else, so that `omni --help` imports no engine.

What they do is `omninfer.cli.commands`'s; what they share with each other (finding the model, opening the
node, telling what happens) is `omninfer.cli.opening`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from omnistore.cli.options import with_caps, with_hints, with_mdns
from omnistore.cli.output import Output, with_output


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of both commands."""
    options = [
        click.option(
            "--layers",
            default="auto",
            metavar="WHICH",
            help="auto; all (here alone); none (no weights here); or the range this machine holds, as 0-15.",
        ),
        click.option(
            "--with", "lenders", multiple=True, metavar="MADDR", help="A machine to use: gets some layers."
        ),
        click.option("--peer", "peers", multiple=True, metavar="MADDR", help="Fetch weights from this peer."),
        click.option(
            "--bootstrap", multiple=True, metavar="MADDR", help="Find peers through this node's DHT."
        ),
        click.option("--engine", default="auto", metavar="NAME", help="auto, mlx, ort or numpy."),
        click.option(
            "--context", type=click.IntRange(min=1), help="Most tokens of prompt and text together."
        ),
        click.option(
            "--kv", type=click.Choice(["full", "q8"]), help="q8 keeps keys and values in 8 bits: less memory."
        ),
        click.option("--temperature", "--temp", type=float, help="0 is greedy; default 0.8."),
        click.option("--top-k", type=int, help="Keep the k likeliest tokens; 0 keeps all; default 40."),
        click.option("--top-p", type=float, help="Keep tokens up to this probability; default 0.95."),
        click.option("--min-p", type=float, help="Keep tokens of this share of the likeliest; default 0.05."),
        click.option(
            "--typical-p", type=float, help="Keep tokens as surprising as is usual; default 1 (all)."
        ),
        click.option(
            "--repeat-penalty", type=float, help="Divide the logits of recent tokens by this; default 1."
        ),
        click.option("--repeat-last-n", type=int, help="How many tokens are recent; default 64."),
        click.option(
            "--presence-penalty", type=float, help="Subtract this from recent tokens' logits; default 0."
        ),
        click.option("--frequency-penalty", type=float, help="The same for each time they occur; default 0."),
        click.option(
            "--logit-bias",
            "biases",
            multiple=True,
            metavar="TOKEN=BIAS",
            help="Add to the logit of a token ID.",
        ),
        click.option(
            "--logprobs", type=int, metavar="N", help="With --json: each token's ln p and the N likeliest."
        ),
        click.option("--seed", type=int, help="The same seed gives the same text; default: a new one."),
        click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text."),
        click.option(
            "--json-schema", "schema", metavar="FILE|JSON", help="Write JSON that this JSON Schema accepts."
        ),
        click.option("--silence", type=click.FloatRange(min=2), default=10.0, hidden=True),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("model", metavar="CID")
@click.option("--prompt", metavar="TEXT", help="What to continue; - reads it from stdin.")
@click.option(
    "--prompt-file", type=click.Path(exists=True, dir_okay=False), help="A file to continue, taken as it is."
)
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Most tokens to write.")
@_shared
@with_caps
@with_mdns
@with_hints
@with_output
def run(output: Output, **options: Any) -> None:
    """Continue a prompt with a model, here and on machines that lend compute.

    CID may also be PUBLISHER/NAME, the name of a model that is here, or the beginning of its CID.

    What is not here is fetched: without --peer and --bootstrap from the local network and nodes met before.

    stdout is the completion and nothing else. With --json, one event per line; the last holds text,
    tokens, prompt_tokens, stages and tokens_per_second.
    """
    # The engines and the network take a second to import: not for `omni run --help`.
    from omninfer.cli import commands

    commands.run(output, options)


@click.command()
@click.argument("model", metavar="CID")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--max-tokens", type=int, default=1024, show_default=True, help="Most tokens of one answer.")
@_shared
@with_caps
@with_mdns
@with_hints
@with_output
def chat(output: Output, **options: Any) -> None:
    """Talk with a model, here and on machines that lend compute.

    CID may also be PUBLISHER/NAME, the name of a model that is here, or the beginning of its CID.

    On a terminal, /exit or end of file leaves and Ctrl-C cuts an answer short. Otherwise each line of
    stdin is a message and its answer goes to stdout.
    """
    from omninfer.cli import commands

    commands.chat(output, options)
