"""Which globs of a new key allow no model, and what to write instead. Pure."""

from __future__ import annotations

from fnmatch import fnmatchcase

from cortex.accounts.keys.key_terms import KeyTerms
from cortex.config.catalogue import Catalogue


def unmatched_globs(terms: KeyTerms, catalogue: Catalogue) -> list[str]:
    """A warning for each glob of `models` and `limits` that matches no model of models.toml. It may be meant for a
    later one."""
    ids = [profile.id for profile in catalogue.models]
    globs = dict.fromkeys([*terms.models, *terms.limits])
    return [_warning(glob, catalogue) for glob in globs if not any(fnmatchcase(each, glob) for each in ids)]


def _warning(glob: str, catalogue: Catalogue) -> str:
    found = {name: target for name, target in catalogue.targets.items() if fnmatchcase(name, glob)}
    meant = catalogue.model_meant_by(glob)
    if found:
        stands = ", ".join(f"{name} is an alias of {target}" for name, target in sorted(found.items()))
    elif meant is not None:
        stands = f"name {meant.id!r}, for all its variants"
    else:
        return f"{glob!r} matches no model of models.toml: `cortex models` lists their ids"
    return f"{glob!r} matches no model, because globs are compared with model ids: {stands}"
