"""The commands of `cortex` and their options. Each imports what it needs when it runs, so that help, version and
completion are fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlencode

import typer

from cortex.cli.key_commands import keys_app
from cortex.cli.live.live_commands import live_app
from cortex.cli.options import (
    DEFAULT_URL,
    ConfigFile,
    DryRun,
    Json,
    Model,
    Node,
    On,
    Url,
    Watch,
    ask,
    complete_node,
    print_answer,
    repeated,
)
from shared.terminal.command_line import command_line

DEFAULT_FLEET = "beast=2xRTX5090,benjy=1xRTX4090,quadbrat=1xRTX3060"

app = command_line("One address in front of a fleet of GPU hosts.")
app.add_typer(keys_app)
app.add_typer(live_app)


UnloadFrom = Annotated[
    str | None,
    typer.Option("--on", metavar="NODE", help="The neuron. Default: all.", autocompletion=complete_node),
]
Instance = Annotated[
    str | None,
    typer.Option("--instance", metavar="NAME", help="One of several engines of the model on the neuron of --on."),
]


@app.command()
def serve(
    config: ConfigFile,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes that share the port. Default: from the file.")
    ] = None,
    fd: Annotated[int | None, typer.Option(hidden=True, help="An inherited, bound socket to listen on.")] = None,
    lifeline_fd: Annotated[int | None, typer.Option(hidden=True, help="Stop when this inherited pipe closes.")] = None,
    remove_state: Annotated[
        bool, typer.Option("--remove-state", hidden=True, help="Remove the state directory at the end.")
    ] = False,
) -> int:
    """Run the front door."""
    from cortex.cli.serve import run_serve

    return run_serve(config, workers=workers, fd=fd, lifeline=lifeline_fd, remove_state=remove_state)


@app.command()
def check(config: ConfigFile, *, as_json: Json = False) -> int:
    """Validate cortex.toml and models.toml, and print every problem."""
    from cortex.cli.serve import run_check

    return run_check(config, as_json=as_json)


@app.command()
def doctor(
    config: ConfigFile,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Ask this model for an answer, loading it if necessary. Default: a loaded one."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Address of the running cortex. Default: from the file; CORTEX_URL is not read."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check a deployment: files, disk, database, neurons, the running cortex, an answer. Exit 1 for a fault."""
    from cortex.cli.doctor.command import run_doctor

    return run_doctor(config, url=url, model=model, json_wanted=as_json)


@app.command(name="import")
def import_models(
    program: Annotated[Literal["llama-swap", "litellm", "ollama"], typer.Argument(help="Whose configuration it is.")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Its config.yaml; for Ollama its models directory, or what `ollama list` prints. - reads stdin.",
        ),
    ],
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write; - prints it.")
    ] = Path("models.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: Json = False,
) -> int:
    """Write a models.toml from the configuration of another program, and say what it could not carry over."""
    from cortex.cli.importing.command import run_import

    return run_import(program, source, output, force=force, as_json=as_json)


@app.command()
def dev(
    *,
    fleet: Annotated[str, typer.Option(help="The hosts, as NAME=COUNTxDEVICE,...")] = DEFAULT_FLEET,
    port: Annotated[int, typer.Option(help="Port on loopback; 0 picks a free one.")] = 31313,
    engine: Annotated[Literal["sim", "vllm"], typer.Option(help="What the neurons run.")] = "sim",
    model_dir: Annotated[Path | None, typer.Option(help="With --engine vllm: the model behind every name.")] = None,
    vllm_command: Annotated[str, typer.Option(help="With --engine vllm: how to start vLLM.")] = "vllm",
    state_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep keys, usage and load times there. Default: until the end only."),
    ] = None,
) -> int:
    """Run a simulated fleet on this machine, without GPU or config file."""
    from cortex.cli.dev.command import run_dev

    return run_dev(fleet, port=port, engine=engine, model_dir=model_dir, vllm_command=vllm_command, state_dir=state_dir)


@app.command()
def simulate(
    *,
    fleet: Annotated[Path, typer.Option(metavar="FILE", help="Hosts, models and load times.")],
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="The requests, as JSON lines or CSV.")] = None,
    workload: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Generate the requests from this description.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated requests.")] = 1,
    load: Annotated[float, typer.Option(metavar="X", help="Multiplies the number of sessions.")] = 1.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare the policies over seeds and loads of the workload.")
    ] = False,
    seeds: Annotated[
        str | None, typer.Option(metavar="A-B", help="Compare, with every seed from A to B. Default: --seed.")
    ] = None,
    loads: Annotated[
        str | None, typer.Option(metavar="X,Y,...", help="Compare, with each of these loads. Default: --load.")
    ] = None,
    bound: Annotated[bool, typer.Option("--bound", help="Compare, also with a wait that no policy can beat.")] = False,
    make_trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the requests to this file and stop.")
    ] = None,
    policy: Annotated[
        Literal["planner", "lru", "first-fit", "all"],
        typer.Option(help="How models are placed; all compares the three."),
    ] = "all",
    by_model: Annotated[bool, typer.Option("--by-model", help="Print a line for each model.")] = False,
    ignore_keys: Annotated[
        bool, typer.Option("--ignore-keys", help="Treat all requests as one caller's: keys take no turns.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> int:
    """Replay a trace of requests on a simulated fleet."""
    if (trace is None) == (workload is None):
        raise typer.BadParameter("give either --trace or --workload")
    from cortex.cli.simulate import parsed_loads, parsed_seeds, run_comparison, run_simulate

    (load,) = parsed_loads("--load", f"{load}")
    if compare or bound or seeds is not None or loads is not None:
        comparing = "--compare" if compare else "--compare, which --seeds, --loads and --bound imply,"
        if workload is None:
            raise typer.BadParameter(f"{comparing} needs --workload")
        if make_trace is not None or by_model or ignore_keys or policy != "all":
            raise typer.BadParameter(f"{comparing} excludes --make-trace, --by-model, --ignore-keys and --policy")
        each_seed = [seed] if seeds is None else parsed_seeds(seeds)
        each_load = [load] if loads is None else parsed_loads("--loads", loads)
        return run_comparison(fleet, workload, seeds=each_seed, loads=each_load, bound=bound, as_json=as_json)
    return run_simulate(
        fleet,
        trace=trace,
        workload=workload,
        seed=seed,
        load=load,
        made_trace=make_trace,
        policy=policy,
        each_model=by_model,
        fair=not ignore_keys,
        as_json=as_json,
    )


@app.command()
def login(
    url: Url = DEFAULT_URL,
    browser: Annotated[
        bool,
        typer.Option("--browser", help="Use a browser on this machine, also if the issuer takes another device's."),
    ] = False,
) -> int:
    """Sign in with an account of OpenID Connect; later commands use it."""
    from cortex.cli.sign_in.login import run_login

    return run_login(url, with_browser=browser)


@app.command()
def logout(url: Url = DEFAULT_URL) -> int:
    """End what `cortex login` has begun."""
    from cortex.cli.sign_in.login import run_logout

    return run_logout(url)


@app.command()
def status(url: Url = DEFAULT_URL, as_json: Json = False, watch: Watch = False) -> int:
    """Show the neurons, their GPUs and their models."""
    from cortex.cli.tables import status_table

    return repeated(lambda: print_answer(url, ask(url, "GET", "/fleet"), as_json, status_table), watch)


@app.command()
def models(url: Url = DEFAULT_URL, as_json: Json = False, watch: Watch = False) -> int:
    """List the models that clients can request."""
    from cortex.cli.tables import models_table

    return repeated(lambda: print_answer(url, ask(url, "GET", "/v1/models"), as_json, models_table), watch)


@app.command()
def usage(
    *,
    group_by: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Some of key, model, variant, node, path, status, hour, day, month; "
            "with --energy of node, device, model, key, kind, hour, day, month. Default: none.",
        ),
    ] = "",
    energy: Annotated[
        bool, typer.Option("--energy", help="The energy of all GPUs: for requests, resident models, and idle.")
    ] = False,
    since: Annotated[
        str | None,
        typer.Option("--from", metavar="TIME", help="2026-11-01, 2026-11-01T12:00Z, 7d, 24h. Default: 30 days."),
    ] = None,
    until: Annotated[str | None, typer.Option("--to", metavar="TIME", help="Likewise, not included.")] = None,
    key: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this key, repeatable.")] = None,
    model: Annotated[list[str] | None, typer.Option(metavar="MODEL", help="Only this model, repeatable.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for spreadsheets.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> int:
    """Show what was used, by whom, and what it cost."""
    from cortex.cli.usage_report import energy_table, usage_csv, usage_table

    if as_csv and as_json:
        raise typer.BadParameter("give either --csv or --json")
    given = [("group_by", group_by), ("from", since), ("to", until)]
    given += [("key", each) for each in key or ()] + [("model", each) for each in model or ()]
    query = urlencode([(name, value) for name, value in given if value])
    answer = ask(url, "GET", f"/usage{'/energy' if energy else ''}?{query}")
    show = energy_table if energy else usage_table
    print_answer(url, answer, as_json, usage_csv if as_csv else show)
    return 0


@app.command()
def explain(model: Model, url: Url = DEFAULT_URL, as_json: Json = False) -> int:
    """Explain where a model would be placed, and why. Exit 1 if the model is unknown."""
    from cortex.cli.tables import explain_table
    from shared.protocol import ErrorCode

    plan = ask(url, "GET", f"/fleet/explain?model={quote(model, safe='')}")
    print_answer(url, plan, as_json, explain_table)
    if not isinstance(plan, dict):
        return 0
    decision = plan.get("decision", {})
    # Without a healthy neuron, a model that the catalogue lacks is refused for that.
    unlisted = decision.get("action") == "refuse" and not plan.get("in_catalogue", True)
    return int(unlisted or decision.get("code") == ErrorCode.MODEL_NOT_FOUND)


@app.command()
def load(
    model: Model,
    *,
    node: On = None,
    instance: Instance = None,
    dry_run: DryRun = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> int:
    """Load a model and wait until it is ready. A bar shows how far it is."""
    from cortex.cli.live.engine_actions import run_dry
    from cortex.cli.live.loading import load_with_progress
    from cortex.cli.tables import loaded_line

    body = {"model": model, "node": node, "instance": instance}
    if dry_run:
        return run_dry(url, "load", body, as_json=as_json)
    answer = load_with_progress(url, body)
    print_answer(url, answer, as_json, loaded_line)
    return 0


@app.command()
def unload(
    model: Model,
    *,
    node: UnloadFrom = None,
    instance: Instance = None,
    drain: Annotated[bool, typer.Option("--drain/--no-drain", help="Let requests in flight finish first.")] = True,
    duration: Annotated[
        str | None,
        typer.Option("--for", metavar="DURATION", help="Do not load it again for this long: 2h, 90m, 1d, 45s."),
    ] = None,
    dry_run: DryRun = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> int:
    """Unload a model. Default: from every neuron, after its requests in flight have finished."""
    from cortex.cli.live.engine_actions import run_dry
    from cortex.cli.tables import unloaded_line
    from cortex.config.durations import parse_duration

    try:
        held = {} if duration is None else {"for_secs": parse_duration(duration)}
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--for") from error
    body = {"model": model, "node": node, "instance": instance, "drain": drain, **held}
    if dry_run:
        return run_dry(url, "unload", body, as_json=as_json)
    return _act(url, "/fleet/unload", body, as_json, unloaded_line)


@app.command()
def drain(node: Node, url: Url = DEFAULT_URL, as_json: Json = False) -> int:
    """Stop sending new loads to a neuron, and requests if another neuron can serve them."""
    from cortex.cli.tables import draining_line

    return _act(url, f"/fleet/nodes/{quote(node, safe='')}/drain", {}, as_json, draining_line)


@app.command()
def resume(node: Node, url: Url = DEFAULT_URL, as_json: Json = False) -> int:
    """End a drain."""
    from cortex.cli.tables import draining_line

    return _act(url, f"/fleet/nodes/{quote(node, safe='')}/resume", {}, as_json, draining_line)


def _act(url: str, path: str, body: dict[str, Any], as_json: bool, show: Callable[[Any], str]) -> int:
    answer = ask(url, "POST", path, body)
    print_answer(url, answer, as_json, show)
    return 0
