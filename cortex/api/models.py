"""`GET /v1/models`: the models that clients can use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from aiohttp import web

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.api.app_keys import CREATED, FLEET, LIVE
from cortex.api.authorization import caller_of
from cortex.api.engines.context_lengths import CONTEXT_LENGTHS, NO_LENGTHS, KnownLengths
from cortex.api.fleet.view import place
from cortex.api.model_shapes import anthropic_model, anthropic_page, codex_model, told_facts
from cortex.config.catalogue import Catalogue
from cortex.config.model_tables import ModelLimit
from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import EngineSnapshot, FleetSnapshot, NodeSnapshot
from cortex.placement.feasibility import FeasibilityCache
from cortex.placement.refusal import no_such_model_error
from shared.http import ANTHROPIC_VERSION

OWNER = "cortex"

BLOCK = 64
"""Entries per piece of the answer."""

Piece = tuple[bytes, tuple[str, ...], bytes]
"""An entry as JSON: the part before the list of neurons, that list, and the part after it. Thousands of models can
share one list of a thousand names."""


async def list_models(request: web.Request) -> web.StreamResponse:
    models, caller = request.app[MODEL_LIST], caller_of(request)
    blocks = await _up_to_date(request)
    if ANTHROPIC_VERSION in request.headers:
        return web.json_response(anthropic_page(models.names_for(caller), request.query, models.entry))
    if caller.models:
        entries = list(map(models.entry, models.names_for(caller)))
        return web.json_response({"object": "list", "data": entries, "models": list(map(codex_model, entries))})
    if len(blocks) == 1 or request.method == "HEAD":
        return web.Response(body=b"".join(blocks), content_type="application/json", charset="utf-8")
    response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
    response.content_length = sum(map(len, blocks))
    await response.prepare(request)
    for block in blocks:  # megabytes, for thousands of models on a thousand neurons
        await response.write(block)
    return response


async def show_model(request: web.Request) -> web.Response:
    await _up_to_date(request)
    entry = request.app[MODEL_LIST].entry(request.match_info["model_id"], caller_of(request))
    return web.json_response(anthropic_model(entry) if ANTHROPIC_VERSION in request.headers else entry)


async def _up_to_date(request: web.Request) -> tuple[bytes, ...]:
    """The list as it is now, in pieces."""
    app, lengths = request.app, request.app[CONTEXT_LENGTHS]
    await lengths.settle()
    return app[MODEL_LIST].blocks(
        app[LIVE].catalogue, app[FLEET].snapshot(), created=app[CREATED], lengths=lengths.known
    )


def model_entry(
    model_id: str,
    catalogue: Catalogue,
    fleet: FleetSnapshot,
    feasibility: FeasibilityCache,
    *,
    created: int,
    lengths: KnownLengths,
) -> dict[str, Any] | None:
    """One entry of the list, for an id or `id@variant`; None if the model cannot be used. `created` is Unix time."""
    profile, variant = catalogue.profile(model_id), catalogue.requested(model_id).variant
    adapter = catalogue.adapters.get(model_id)
    feasible_on = () if profile is None else feasibility.nodes(profile, fleet)
    present = [
        engine
        for engine in fleet.engines(catalogue.requested(model_id).model_id)
        if engine.node.healthy and variant in (None, engine.view.variant)
        if adapter is None or model_id in engine.view.adapters
    ]
    loaded = any(engine.view.loaded for engine in present)
    if not feasible_on and not loaded:
        return None
    present_lengths = [lengths.of_engines[engine.key] for engine in present if engine.key in lengths.of_engines]
    length = min(present_lengths, default=None) or lengths.remembered.get(catalogue.requested(model_id).name)
    told = told_facts(engine.view for engine in present)
    told_limit = told.pop("limit", {})
    limits = [each.limit for each in (profile, adapter) if each is not None and each.limit is not None]
    limit = {**told_limit, **{key: tokens for each in limits for key, tokens in _given(each).items()}}
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "loaded": loaded,
        "feasible_on": feasible_on,
        "locations": [_location(profile, engine, lengths.of_engines.get(engine.key)) for engine in present],
        "limit": limit or None,
        "max_model_len": length or limit.get("context"),
        "harness": None if profile is None else profile.harness,
        "quant": None if profile is None else profile.quant,
        "pinned_on": [] if profile is None else list(profile.pinned_on),
        **({} if profile is None or profile.parallel is None else {"parallel": profile.parallel.model_dump()}),
        **({} if adapter is None else {"base": adapter.base}),
        **({} if profile is None or adapter is not None else _variants(profile)),
        **({} if variant is None or profile is None else {"variant": variant, "variant_of": profile.id}),
        **told,
    }


def _location(profile: ModelProfile | None, engine: EngineSnapshot, length: int | None) -> dict[str, Any]:
    view = engine.view
    choice = None if profile is None else profile.choice(view.variant) or profile
    estimate = view.vram_used_mb or (None if choice is None else choice.vram_mb)
    location: dict[str, Any] = {**place(engine.key), "status": view.status, "vram_estimate_mb": estimate}
    if length is not None:
        location["max_model_len"] = length
    if view.variant is not None:
        location["variant"] = view.variant
    if view.parallel is not None:
        location["parallel"] = view.parallel.model_dump()
    if view.group is not None:
        location["group"] = view.group.model_dump(include={"id", "rank", "size"})
    if view.unservable_because is not None:
        location |= {"servable": False, "reason": view.unservable_because}
    if view.failed_because is not None:
        location["reason"] = view.failed_because
    return location


def _variants(profile: ModelProfile) -> dict[str, Any]:
    return {"variants": [each.name for each in profile.variants]} if profile.variants else {}


def _given(limit: ModelLimit) -> dict[str, Any]:
    return limit.model_dump(include={"context", "output"}, exclude_none=True)


def _alias(alias: str, target: str, entry: dict[str, Any], catalogue: Catalogue) -> dict[str, Any]:
    named = catalogue.alias_of(alias)
    parameters = {} if named is None or not named.parameters else {"alias_parameters": named.parameters}
    return {**entry, "id": alias, "alias_of": target, **parameters}


class ModelList:
    """Catalogue models that some known hardware can hold, models loaded anywhere, and their aliases, as JSON: `data` in
    OpenAI's shape and `models` in Codex's. An entry is rendered again only after its contents have changed.

    `feasible_on` depends on topology, which stays known while a neuron is away: a model does not vanish from the list
    because its host restarts.
    """

    def __init__(self) -> None:
        self._feasibility = FeasibilityCache()
        self._catalogue = Catalogue()
        self._fleet = FleetSnapshot()
        self._created = 0
        self._lengths: KnownLengths = NO_LENGTHS
        self._aliases: dict[str, list[str]] = {}  # of an id or `id@variant`
        self._others: dict[str, list[str]] = {}  # by id: the listed names of its variants and adapters, then aliases
        self._pieces: dict[str, list[Piece]] = {}  # by id: the entry and those of its other names, if listed
        self._codex: dict[str, list[bytes]] = {}  # likewise, in Codex's shape
        self._names: list[str] = []
        self._blocks: list[tuple[list[Piece], bytes]] = []  # each with its pieces
        self._answer: tuple[bytes, ...] | None = None

    @property
    def names(self) -> Sequence[str]:
        """Ids and aliases in the order of the list, as of the last `blocks`."""
        return self._names

    def names_for(self, caller: Caller) -> Sequence[str]:
        """The `names` that a caller may use."""
        return [name for name in self._names if self._may_use(caller, name)] if caller.models else self._names

    def _may_use(self, caller: Caller, name: str) -> bool:
        model_id = self._catalogue.resolve(name)
        is_adapter = model_id in self._catalogue.adapters
        return caller.may_use(model_id if is_adapter else self._catalogue.requested(model_id).model_id)

    def entry(self, name: str, caller: Caller = ANONYMOUS) -> dict[str, Any]:
        """The entry of an id or alias, as of the last `blocks`.

        Raises:
            NotFound: it is not listed for this caller.
        """
        model_id = self._catalogue.resolve(name)
        entry = self._entry(model_id) if self._may_use(caller, name) else None
        if entry is None:
            raise no_such_model_error(name, self.names_for(caller), self._catalogue)
        return entry if name == model_id else _alias(name, model_id, entry, self._catalogue)

    def blocks(
        self, catalogue: Catalogue, fleet: FleetSnapshot, *, created: int, lengths: KnownLengths = NO_LENGTHS
    ) -> tuple[bytes, ...]:
        """The whole answer in pieces; the same object until something changes. `lengths` (`ContextLengths.known`) must
        be another object after a change."""
        before = self._fleet
        if catalogue is not self._catalogue or created != self._created:
            before, self._answer = FleetSnapshot(), None
            self._catalogue, self._created = catalogue, created
            self._pieces, self._codex, self._aliases, self._others = {}, {}, {}, {}
            for alias, target in catalogue.targets.items():
                self._aliases.setdefault(target, []).append(alias)
        if self._answer is None or fleet is not before or lengths is not self._lengths:
            self._fleet = fleet
            changed = _held_differently(before, fleet)
            if lengths is not self._lengths:
                changed |= _other_lengths(self._lengths, lengths)
                self._lengths = lengths
            if self._answer is None or fleet.topology is None or fleet.topology is not before.topology:
                changed |= self._feasible_elsewhere()
            for model_id in changed:
                self._make(model_id)
            if changed or self._answer is None:
                self._answer = self._joined()
        return self._answer

    def _feasible_elsewhere(self) -> set[str]:
        """Catalogue models whose list of neurons has changed. Usually none: a neuron restarted with its old devices."""
        found: set[str] = set()
        for profile in self._catalogue.models:
            if profile.base is not None:  # made with its base
                continue
            names, pieces = self._feasibility.nodes(profile, self._fleet), self._pieces.get(profile.id)
            if pieces is None or not names or profile.variants:
                found.add(profile.id)
            elif pieces[0][1] is not names:
                self._pieces[profile.id] = [(opening, names, rest) for opening, _, rest in pieces]
                self._answer = None
        return found

    def _entry(self, model_id: str) -> dict[str, Any] | None:
        return model_entry(
            model_id,
            self._catalogue,
            self._fleet,
            self._feasibility,
            created=self._created,
            lengths=self._lengths,
        )

    def _make(self, model_id: str) -> None:
        entry = self._entry(model_id)
        if entry is not None:
            others = {name: self._entry(name) for name in self._catalogue.names_of(model_id)[1:]}
            named = {model_id: entry, **{name: each for name, each in others.items() if each is not None}}
            aliases = [
                _alias(alias, name, each, self._catalogue)
                for name, each in named.items()
                for alias in self._aliases.get(name, ())
            ]
            entries = [*named.values(), *aliases]
            self._others[model_id] = [each["id"] for each in entries[1:]]
            self._pieces[model_id] = [_piece(each) for each in entries]
            self._codex[model_id] = [json.dumps(codex_model(each)).encode() for each in entries]
        else:
            self._pieces.pop(model_id, None)
            self._codex.pop(model_id, None)

    def _joined(self) -> tuple[bytes, ...]:
        """Catalogue models, then those that only neurons know, then variants, adapters and aliases. Unchanged blocks
        are kept."""
        catalogue = self._catalogue
        order = [profile.id for profile in catalogue.models if profile.base is None]
        order += [model_id for model_id in self._fleet.listed_models if catalogue.profile(model_id) is None]
        listed = [model_id for model_id in order if model_id in self._pieces]
        others = [(model_id, place) for model_id in listed for place in range(1, len(self._pieces[model_id]))]
        self._names = [*listed, *(self._others[model_id][place - 1] for model_id, place in others)]
        places = [*((model_id, 0) for model_id in listed), *others]
        entries = [self._pieces[model_id][place] for model_id, place in places]
        codex = [self._codex[model_id][place] for model_id, place in places]
        before, self._blocks = self._blocks, []
        made: dict[int, bytes] = {}  # by identity: hashing a thousand names takes as long as encoding them
        for start in range(0, len(entries), BLOCK):
            block = entries[start : start + BLOCK]
            known = before[len(self._blocks)] if len(self._blocks) < len(before) else None
            if known is None or known[0] != block:
                known = block, _block(block, made, first=start == 0)
            self._blocks.append(known)
        codex_blocks = [b", ".join(codex[start : start + BLOCK]) for start in range(0, len(codex), BLOCK)]
        separated = (text for block in codex_blocks for text in (b", ", block))
        parts = [
            b'{"object": "list", "data": [',
            *(text for _, text in self._blocks),
            b'], "models": [',
            *islice(separated, 1, None),
            b"]}",
        ]
        return (b"".join(parts),) if len(parts) <= 5 else tuple(parts)


def _block(entries: Iterable[Piece], made: dict[int, bytes], *, first: bool) -> bytes:
    parts: list[bytes] = []
    for opening, names, rest in entries:
        if id(names) not in made:
            made[id(names)] = json.dumps(names).encode()
        parts += (b", ", opening, made[id(names)], rest)
    return b"".join(parts[1:] if first else parts)


def _held_differently(before: FleetSnapshot, after: FleetSnapshot) -> set[str]:
    """Models whose state on some neuron differs between the two."""
    changed: set[str] = set()
    if after.topology is not None and after.topology is before.topology:  # the neurons are the same
        pairs: Iterable[tuple[NodeSnapshot | None, NodeSnapshot | None]] = zip(
            before.nodes.values(), after.nodes.values(), strict=True
        )
    else:
        pairs = [(before.nodes.get(name), after.nodes.get(name)) for name in {*before.nodes, *after.nodes}]
    for old, new in pairs:
        if old is new:
            continue
        if old is None or new is None or old.healthy != new.healthy:
            changed.update(*(node.models for node in (old, new) if node is not None))
        elif old.models is not new.models:
            ids = old.models.keys() | new.models.keys()
            changed.update(i for i in ids if old.models.get(i) is not new.models.get(i))
    return changed


def _other_lengths(before: KnownLengths, after: KnownLengths) -> set[str]:
    """Ids of the models whose context length has changed."""
    names = {name for name, _ in before.remembered.items() ^ after.remembered.items()}
    engines = {key.model_id for key, _ in before.of_engines.items() ^ after.of_engines.items()}
    return engines | names | {name.rpartition("@")[0] for name in names}


MODEL_LIST = web.AppKey("model_list", ModelList)


def _piece(entry: dict[str, Any]) -> Piece:
    """The fields before `feasible_on` and those after it are rendered on their own; neither part is empty."""
    items = list(entry.items())
    place = list(entry).index("feasible_on")
    opening = json.dumps(dict(items[:place])).removesuffix("}") + ', "feasible_on": '
    rest = ", " + json.dumps(dict(items[place + 1 :])).removeprefix("{")
    return opening.encode(), entry["feasible_on"], rest.encode()
