"""What was read from another program's files, and its models.toml. Pure."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tomli_w
from pydantic import ValidationError

from cortex.config.catalogue import Catalogue
from shared.protocol import first_problem


class ImportNote(NamedTuple):
    """What could not be carried over as it was, and what to do. `entry`: the name in the other file; "" for all."""

    entry: str
    text: str


@dataclass
class CarriedOver:
    """The tables of a models.toml as they will be written, and the notes about them."""

    models: list[dict[str, Any]] = field(default_factory=list)
    aliases: dict[str, Any] = field(default_factory=dict)
    notes: list[ImportNote] = field(default_factory=list)
    harnesses: set[str] = field(default_factory=set)
    """Names of `[harness.NAME]` in neuron.toml that the models need."""

    def note(self, entry: str, text: str) -> None:
        """Adds a note once."""
        if ImportNote(entry, text) not in self.notes:
            self.notes.append(ImportNote(entry, text))

    def model(self, model_id: str) -> dict[str, Any] | None:
        """The table of the model, if there is one."""
        return next((each for each in self.models if each["id"] == model_id), None)

    def target(self, alias: str) -> str | None:
        """The model that the alias stands for; None if there is no such alias."""
        value = self.aliases.get(alias)
        return value["model"] if isinstance(value, dict) else value

    def changes(self, alias: str) -> dict[str, Any]:
        """What the alias changes in requests."""
        value = self.aliases.get(alias)
        return {key: each for key, each in value.items() if key != "model"} if isinstance(value, dict) else {}

    def add_alias(self, alias: str, target: str, **changes: Any) -> None:
        """Another name for a model, which may change requests. Notes a name that is taken, and changes that differ
        from those of the same alias before."""
        value = {"model": target, **changes} if changes else target
        if self.model(alias) is not None or self.target(alias) not in (None, target):
            self.note(alias, f"the alias for {target!r} is left out: the name is taken")
        elif self.aliases.setdefault(alias, value) != value:
            self.note(alias, "its entries change requests differently: only the changes of the first are kept")

    def leave_out(self, entry: str, table: dict[str, Any], advice: dict[str, str], *, known: set[str]) -> None:
        """Notes the keys of a table that nothing was made of. `advice`: what to do about some of them; "" for nothing,
        and then there is no note."""
        for key in table:
            if key not in known and advice.get(key, key) != "":
                self.note(entry, f"{key}: left out" + (f"; {advice[key]}" if key in advice else ""))


def models_toml(found: CarriedOver, source: str) -> str:
    """The file, with the notes as comments. Of valid tables: see `drop_invalid`."""
    lines = [f"# Written by `cortex import` from {one_line(source)}. Read the comments, then delete them.", ""]
    lines += _comments(found, "")
    for model in found.models:
        table = tomli_w.dumps({"models": model}).strip().replace("[models]", "[[models]]", 1)  # a table of its own
        lines += [*_comments(found, model["id"]), table, ""]
    if found.aliases:
        lines += [tomli_w.dumps({"aliases": found.aliases}).strip(), ""]
    ids = {model["id"] for model in found.models}
    for entry in dict.fromkeys(note.entry for note in found.notes if note.entry and note.entry not in ids):
        lines += [f"# {one_line(entry)}:", *_comments(found, entry)]
    return "\n".join(lines)


def one_line(text: str) -> str:
    """The text without line breaks and control characters, which a TOML comment must not have."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _comments(found: CarriedOver, entry: str) -> list[str]:
    return [
        line
        for note in found.notes
        if note.entry == entry
        for line in textwrap.wrap(
            one_line(note.text), 118, initial_indent="# ", subsequent_indent="#   ", break_long_words=False
        )
    ]


def drop_invalid(found: CarriedOver) -> None:
    """Leaves out, with a note, what models.toml does not allow."""
    for table in list(found.models):
        try:
            Catalogue.model_validate({"models": [table]})
        except ValidationError as error:
            found.models.remove(table)
            found.note(str(table["id"]), f"left out: {': '.join(first_problem(error))}")
    for alias, value in list(found.aliases.items()):
        model_id = found.target(alias)
        if found.model(alias) is not None:
            del found.aliases[alias]
            found.note(alias, f"the alias for {model_id!r} is left out: the name is taken")
            continue
        try:
            Catalogue.model_validate({"models": [{"id": model_id}], "aliases": {alias: value}})
        except ValidationError as error:
            del found.aliases[alias]
            found.note(alias, f"the alias is left out: {': '.join(first_problem(error))}")
        else:
            if model_id is None or found.model(model_id) is None:
                del found.aliases[alias]
                found.note(alias, f"the alias is left out: {model_id!r} is not carried over")
