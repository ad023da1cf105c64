"""Cortex's answers as tables for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from itertools import zip_longest
from typing import Any

from cortex.config.durations import duration_text
from cortex.routing.replica import ReplicaKey
from shared.protocol import Parallelism
from shared.terminal.tables import Coloured, table

MAX_REPEATED = 24
"""Characters of a reason that may stand both above a table and in it."""


def status_table(fleet: dict[str, Any]) -> str:
    """Each neuron with its GPUs, a row for each, and its engines, a row for each; then loads, failures and waits."""
    rows: list[list[object]] = []
    for node in fleet["nodes"]:
        state = "healthy" if node["healthy"] else _down(node)
        state += ", draining" if node["draining"] else ""
        colour = ("yellow" if node["draining"] else "green") if node["healthy"] else "red"
        devices, models = [*map(_device, node["devices"]), *_ram(node)] or ["-"], _models(node)
        rows.append([node["name"], Coloured(state, colour), devices[0], models[0]])
        rows += [["", "", *pair] for pair in zip_longest(devices[1:], models[1:], fillvalue="")]
    text = table([["NODE", "STATE", "DEVICES", "MODELS"], *rows])
    loads = [[job["model"], _place(job), job.get("phase", "loading"), job["reason"]] for job in fleet["loads"]]
    text += "\n\n" + table([["LOADING", "ON", "PHASE", "REASON"], *loads]) if loads else ""
    failed = [[model["id"], _place({**model, "node": node["name"]}), _why(model)] for node, model in _failed(fleet)]
    text += "\n\n" + table([["FAILED", "ON", "REASON"], *failed]) if failed else ""
    waiting = [[entry["model"], str(entry["count"]), entry["for"] or "-"] for entry in fleet.get("waiting", ())]
    text += "\n\n" + table([["WAITING FOR", "REQUESTS", "STATUS"], *waiting]) if waiting else ""
    held = [
        [entry["model"], entry["node"] or "every neuron", duration_text(entry["remaining_secs"])]
        for entry in fleet.get("held", ())
    ]
    text += "\n\n" + table([["HELD BACK", "ON", "FOR ANOTHER"], *held]) if held else ""
    text += "".join(f"\n\nwarning: {each}" for each in fleet.get("warnings", ()))
    error = fleet.get("configuration", {}).get("error")
    return text + (
        f"\n\nThe configuration files are invalid, the previous configuration is in use:\n{error}" if error else ""
    )


def _failed(fleet: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The engines that failed, each with its node."""
    return [(node, model) for node in fleet["nodes"] for model in node["models"] if model["status"] == "failed"]


def _why(model: dict[str, Any]) -> str:
    """Why an engine failed, on one line."""
    return " ".join(str(model.get("error") or model.get("reason") or "-").split())


def models_table(models: dict[str, Any]) -> str:
    rows = [
        [
            entry["id"],
            _yes_or_no(entry["loaded"]),
            ", ".join(entry["feasible_on"]) or "-",
            _places(entry["locations"]) or "-",
            _stands_for(entry),
        ]
        for entry in models["data"]
    ]
    return table([["MODEL", "LOADED", "FEASIBLE ON", "WHERE", ""], *rows])


def new_key_text(key: dict[str, Any]) -> str:
    """A key that was made just now. The hint and the key are apart, so that the key can be copied."""
    where = f" in {key['database']}" if "database" in key else ""
    return f"{key['name']} ({key['role']}){where}. The key is shown this once:\n{key['key']}"


def keys_table(answer: dict[str, Any]) -> str:
    rows = [
        [
            key["name"],
            key["id"],
            f"{key['prefix']}…" if key["prefix"] else "-",
            key["role"],
            ", ".join(key["models"]) or "all",
            _limits_text(key),
            _expiry(key["expires_at"]),
            key["source"],
        ]
        for key in answer["keys"]
    ]
    return table([["NAME", "ID", "KEY", "ROLE", "MODELS", "LIMITS", "EXPIRES", "SOURCE"], *rows])


def _limits_text(limits: dict[str, Any]) -> str:
    """`60 rpm, 20EUR/month; org/*: 5 rpm`."""
    found = [f"{limits[name]} {name}" for name in ("rpm", "tpm", "parallel") if limits[name] is not None]
    text = ", ".join([*found, *limits["budget"]])
    by_model = [f"{glob}: {_limits_text(inner)}" for glob, inner in limits.get("limits", {}).items()]
    return "; ".join(filter(None, [text, *by_model])) or "none"


def _expiry(secs: float | None) -> str:
    if secs is None:
        return "never"
    at = datetime.fromtimestamp(secs, timezone.utc)
    return f"{at:%Y-%m-%d %H:%M} UTC{' (expired)' if at <= datetime.now(timezone.utc) else ''}"


def _stands_for(entry: dict[str, Any]) -> str:
    if "alias_of" in entry:
        return f"alias of {entry['alias_of']}"
    return f"adapter of {entry['base']}" if "base" in entry else ""


def _places(locations: list[dict[str, Any]]) -> str:
    """`beast (loaded), benjy (2 loaded, sleeping)`: the engines of each neuron by their status."""
    found: dict[str, Counter[str]] = {}
    for each in locations:
        why = f": {each['reason']}" if each["status"] == "failed" and "reason" in each else ""
        found.setdefault(each["node"], Counter())[_status(each) + why] += 1
    texts = {
        node: ", ".join(f"{count} {status}" if count > 1 else status for status, count in counts.items())
        for node, counts in found.items()
    }
    return ", ".join(f"{node} ({text})" for node, text in texts.items())


def explain_table(plan: dict[str, Any]) -> str:
    decision = plan["decision"]
    where = f" on {decision['node']}" if "node" in decision else ""
    devices = f", devices {decision['devices']}" if decision.get("devices") else ""
    with_variants = any("variant" in node for node in plan["nodes"])
    rows = [
        [
            node["node"],
            _yes_or_no(node["feasible"]),
            node["status"] or "-",
            *([_variants_of(node)] if with_variants else []),
            _devices_of(node),
            "; ".join([_reason(node, decision["reason"]), *_passed_over(node)]),
        ]
        for node in plan["nodes"]
    ]
    head = f"{plan['model']}: {decision['action']}{where}{devices}: {decision['reason']}"
    head += _of_minimum(plan.get("replicas"))
    head += "".join(f"\n  {line}" for line in _of_alias(plan.get("alias", {})))
    if decision.get("devices_because"):
        head += f"\n  devices: {decision['devices_because']}"
    for gone in decision.get("evictions", ()):
        idle = "" if gone["idle_secs"] is None else f", last used {gone['idle_secs']:.0f} s ago"
        head += f"\n  evicts {gone['model']} ({gone['state']}, priority {gone['priority']}{idle})"
    if decision.get("expected_load_secs") is not None:
        head += f"\n  the load should take about {decision['expected_load_secs']:.0f} s"
    head += "".join(f"\n  {line}" for line in [*_failures(plan["nodes"]), *_pauses(plan["nodes"])])
    variant = ["VARIANT"] if with_variants else []
    text = head + "\n\n" + table([["NODE", "FEASIBLE", "STATUS", *variant, "DEVICES", "REASON"], *rows])
    return "\n\n".join([text, *_claims(plan.get("claims", ())), *plan.get("hints", ())])


def _claims(claims: Sequence[dict[str, Any]]) -> list[str]:
    """The models that wait, in their order, and whose claim it is."""
    if not claims:
        return []
    rows = [
        [
            f"{claim['rank']}{' (starving)' if claim['starving'] else ''}",
            claim["model"],
            claim["key"] or "-",
            claim["key_priority"],
            f"{claim['device_secs']:.0f} s",
            claim["requests"],
            f"{claim['waiting_secs']:.0f} s",
        ]
        for claim in claims
    ]
    return [table([["RANK", "WAITING MODEL", "KEY", "PRIORITY", "DEVICE TIME", "REQUESTS", "SINCE"], *rows])]


def _of_alias(alias: dict[str, Any]) -> list[str]:
    """What a request for the alias gets, one line for each of `set`, `default` and `drop`."""
    texts = {"set": "sets", "default": "sets by default", "drop": "drops"}
    return [
        f"{alias['name']} {text} {', '.join(alias[kind]) if kind == 'drop' else json.dumps(alias[kind])}"
        for kind, text in texts.items()
        if kind in alias
    ]


def loaded_line(done: dict[str, Any]) -> str:
    """What `cortex load` prints."""
    if "load_secs" not in done:
        return f"{done['model']} was already loaded on {_place(done)}"
    return f"{done['model']} is loaded on {_place(done)} in {done['load_secs']:.1f} s"


def unloaded_line(done: dict[str, Any]) -> str:
    """What `cortex unload` prints: where, and what becomes of the model unless that is left to the next request."""
    model, held_until = done["model"], done.get("held_until")
    places = ", ".join(map(_place, done["results"]))
    text = f"{model} is unloaded from {places}" if places else f"{model} is not loaded"
    if held_until is not None:
        until = datetime.fromtimestamp(held_until)  # noqa: DTZ006 - shown in local time
        text += f"\nit is held back until {until:%Y-%m-%d %H:%M:%S}; `cortex load {model}` ends that sooner"
    if held_until is not None or done.get("replicas_min"):
        text += f"\n{done['next']}"
    return f"{text}\nwarning: {done['warning']}" if "warning" in done else text


def draining_line(done: dict[str, Any]) -> str:
    """What `cortex drain` and `cortex resume` print."""
    node = done["node"]
    text = f"{node} takes loads and requests as usual"
    if done["draining"]:
        text = (
            f"{node} is draining: it gets no new loads, and requests only for models that no other neuron has loaded. "
            f"`cortex resume {node}` ends this"
        )
    return f"{text}\nwarning: {done['warning']}" if "warning" in done else text


def _passed_over(node: dict[str, Any]) -> list[str]:
    """The better variants of a model that its node does not get."""
    return [f"not {better['variant']}: {better['reason']}" for better in node.get("passed_over", ())]


def _failures(nodes: list[dict[str, Any]]) -> list[str]:
    """Why the model's engines on these nodes failed."""
    engines = [(node["node"], each) for node in nodes for each in node.get("instances", ()) if each.get("error")]
    return [f"failed on {_place({**each, 'node': name})}: {each['error']}" for name, each in engines]


def _pauses(nodes: list[dict[str, Any]]) -> list[str]:
    """Until when a model is not loaded on these nodes."""
    found: dict[str, list[str]] = {}
    for node in nodes:
        secs = node.get("retry_in_secs")
        if secs is not None:
            until = datetime.now().astimezone() + timedelta(seconds=secs)
            text = f"until {until:%Y-%m-%d %H:%M:%S}, for another {duration_text(secs)}"
            found.setdefault(text, []).append(node["node"])
    return [f"not loaded on {', '.join(names)} {text}" for text, names in found.items()]


def _down(node: dict[str, Any]) -> str:
    since = node.get("silent_since")
    if since is None:
        return "not reached yet"
    return f"down since {datetime.fromtimestamp(since):%Y-%m-%d %H:%M:%S}: {node['last_error']}"  # noqa: DTZ006 - shown in local time


def _reason(node: dict[str, Any], decided: str) -> str:
    """Why the node fits or not, unless the decision above the table says the same of it."""
    reason = str(node["reason"])
    if reason == "draining":
        return f"draining: takes no new loads until `cortex resume {node['node']}`"
    if _held(node) and node["devices"]:
        return f"another on {' '.join(map(str, node['devices']))}: {reason}"
    return "as above" if len(reason) > MAX_REPEATED and reason in decided else reason


def _held(node: dict[str, Any]) -> list[str]:
    """The devices of each engine of the model on the node."""
    return [" ".join(map(str, each["devices"])) for each in node.get("instances", ()) if each["devices"]]


def _devices_of(node: dict[str, Any]) -> str:
    """Those that the model's engines there have; without any, those that the next one would get."""
    return ", ".join(_held(node)) or " ".join(map(str, node["devices"])) or "-"


def _variants_of(node: dict[str, Any]) -> str:
    held = [each["variant"] for each in node.get("instances", ()) if each["devices"] and each.get("variant")]
    return ", ".join(dict.fromkeys(held)) or node["variant"] or "-"


def _of_minimum(replicas: dict[str, Any] | None) -> str:
    if replicas is None:
        return ""
    starting = f", {replicas['coming']} on the way" if replicas["coming"] else ""
    text = f"\n  {replicas['serving']} of replicas.min {replicas['min']} serving{starting}"
    return f"{text}; missing: {replicas['missing_because']}" if replicas["missing_because"] else text


def _yes_or_no(yes: bool) -> str:
    return Coloured("yes", "green") if yes else "no"


def _ram(node: dict[str, Any]) -> list[str]:
    """The host's RAM, on a host without GPUs or with models in RAM."""
    host = node.get("host")
    if not host or (node["devices"] and not any(model.get("ram_booked_mb") for model in node["models"])):
        return []
    used = host.get("ram_used_mb")
    return [f"RAM {'?' if used is None else used}/{host['ram_total_mb']} MiB"]


def _device(device: dict[str, Any]) -> str:
    name = f"{device['index']}: {device['name']}"
    if device.get("lost"):
        return Coloured(f"{name} LOST: {device['lost']}", "red")
    if device.get("fault"):
        return Coloured(f"{name} SICK: {device['fault']}", "red")
    used = device.get("vram_used_mb")
    memory = f"{'?' if used is None else used}/{device['vram_total_mb']} MiB"
    text = f"{name} {'in MIG mode' if device.get('mig_mode') else memory}"
    return Coloured(f"{text} ({'; '.join(device['warnings'])})", "yellow") if device.get("warnings") else text


def _place(where: dict[str, Any]) -> str:
    """`beast`, or `beast#1` for an instance that is not the first: as in cortex's log."""
    return ReplicaKey("", where["node"], where.get("instance") or "").name


def _models(node: dict[str, Any]) -> list[str]:
    """The engines of a node, those of a model together; `-` if it has none."""
    counts = Counter(model["id"] for model in node["models"])
    models = sorted(node["models"], key=lambda model: (model["id"], len(model.get("instance") or ""), _name(model)))
    several = len(node["devices"]) > 1
    return [_model(model, named=counts[model["id"]] > 1, located=several) for model in models] or ["-"]


def _name(model: dict[str, Any]) -> str:
    return f"{model['id']}#{model.get('instance')}"


def _model(model: dict[str, Any], *, named: bool, located: bool) -> str:
    """`named`: the neuron has several engines of the model, so each shows its instance. `located`: it has several
    devices, so each shows its own."""
    status, name = _status(model), _name(model) if named else model["id"]
    if located and model.get("devices"):
        name += f" on {' '.join(map(str, model['devices']))}"
    progress = model.get("progress") or {}
    more = f", {Parallelism.model_validate(model['parallel'])}" if model.get("parallel") else ""
    more += f", with {', '.join(model['adapters'])}" if model.get("adapters") else ""
    if model["status"] == "loaded" or not progress.get("phase"):
        return f"{name} ({status}{more})"
    shown = status.removeprefix("loading").removeprefix(", ")
    return f"{name} ({f'{shown}, ' if shown else ''}{_progress(progress)}{more})"


def _status(place: dict[str, Any]) -> str:
    """The status of a model on a node, with its variant if it has one."""
    return ", ".join(filter(None, (place["status"], place.get("variant"))))


def _progress(progress: dict[str, Any]) -> str:
    """`loading weights 40 %, about 35 s`: the phase, and as much of the rest as is known."""
    text = str(progress["phase"])
    if progress.get("fraction") is not None:
        text += f" {progress['fraction'] * 100:.0f} %"
    return text + (f", about {progress['remaining_secs']:.0f} s" if progress.get("remaining_secs") is not None else "")
