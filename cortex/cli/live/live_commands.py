"""The commands of `cortex` that show what happens while it happens, and their options."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cortex.cli.options import (
    DEFAULT_URL,
    DryRun,
    Json,
    Model,
    Url,
    Watch,
    complete_model,
    complete_node,
    print_answer,
    repeated,
)

live_app = typer.Typer()
OnAll = Annotated[
    str | None,
    typer.Option("--on", metavar="NODE", help="The neuron. Default: all.", autocompletion=complete_node),
]
Engine = Annotated[str | None, typer.Option("--instance", metavar="NAME", help="Only this engine of the neuron.")]


@live_app.command()
def top(
    url: Url = DEFAULT_URL,
    order: Annotated[
        Literal["name", "running", "waiting", "tokens"], typer.Option("--sort", help="How models are sorted.")
    ] = "name",
) -> int:
    """Show the fleet on the whole screen as it changes: hosts, GPUs, models, loads, tokens per second."""
    from cortex.cli.live.top import run_top

    return run_top(url, order)


@live_app.command()
def logs(
    model: Model,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with each line that comes.")] = False,
    tail: Annotated[int, typer.Option(metavar="N", min=0, max=10_000, help="Lines from the end.")] = 100,
    node: OnAll = None,
    instance: Engine = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> int:
    """Print what the engines of a model write, wherever they run."""
    from cortex.cli.live.logs import run_logs

    return run_logs(url, model, node=node, instance=instance, tail=tail, follow=follow, as_json=as_json)


@live_app.command()
def requests(
    *,
    errors: Annotated[bool, typer.Option("--errors", help="Only those that ended in an error.")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Only for this model.", autocompletion=complete_model)
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="NAME", help="Only of this key.")] = None,
    node: Annotated[
        str | None, typer.Option("--on", metavar="NODE", help="Only there.", autocompletion=complete_node)
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="The most of each kind.")] = 30,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    watch: Watch = False,
) -> int:
    """Show the requests that run and the last that ended: where each went, what it waited for, errors."""
    from cortex.cli.live.requests import ask_requests, requests_table

    def show() -> None:
        answer = ask_requests(url, errors=errors, model=model, key=key, node=node, limit=limit)
        print_answer(url, answer, as_json, requests_table)

    return repeated(show, watch)


@live_app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Ask this and end. Default: a conversation.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")] = None,
    url: Url = DEFAULT_URL,
    *,
    as_json: Json = False,
) -> int:
    """Try a model. It is loaded first if need be, and the line below says how far that is."""
    from cortex.cli.live.chat import run_chat

    return run_chat(url, model, prompt, system, as_json=as_json)


@live_app.command()
def config(
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Only what is wrong in the files and what a reload would change.")
    ] = False,
    reload: Annotated[bool, typer.Option("--reload", help="Have cortex read and apply the files first.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> int:
    """Show a running cortex's configuration, what is wrong in its files, and what a reload would change. Exit 1 for
    errors. `cortex check` looks at files without a running cortex."""
    from cortex.cli.live.configuration import run_config

    return run_config(url, check=check, reload=reload, as_json=as_json)


@live_app.command()
def sleep(
    model: Model,
    *,
    node: OnAll = None,
    instance: Engine = None,
    dry_run: DryRun = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> int:
    """Put a model to sleep: it leaves the GPU's memory and wakes faster than it loads."""
    from cortex.cli.live.engine_actions import run_engine_action

    body = {"model": model, "node": node, "instance": instance}
    return run_engine_action(url, "sleep", body, dry_run=dry_run, as_json=as_json)


@live_app.command()
def wake(
    model: Model,
    *,
    node: OnAll = None,
    instance: Engine = None,
    dry_run: DryRun = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> int:
    """Wake a model that sleeps, and wait until it is ready."""
    from cortex.cli.live.engine_actions import run_engine_action

    body = {"model": model, "node": node, "instance": instance}
    return run_engine_action(url, "wake", body, dry_run=dry_run, as_json=as_json)


@live_app.command()
def restart(
    model: Model,
    *,
    node: OnAll = None,
    instance: Engine = None,
    drain: Annotated[bool, typer.Option("--drain/--no-drain", help="Let requests in flight finish first.")] = True,
    dry_run: DryRun = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> int:
    """End a model's engines, start them again in the same place, and wait until they are ready."""
    from cortex.cli.live.engine_actions import run_engine_action

    body = {"model": model, "node": node, "instance": instance, "drain": drain}
    return run_engine_action(url, "restart", body, dry_run=dry_run, as_json=as_json)
