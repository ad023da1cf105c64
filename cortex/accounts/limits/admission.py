"""Which limits hold for a request, what it may use at most, and whether they admit it. Pure."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final, NamedTuple

from msgspec.structs import astuple

from cortex.accounts.limits.budget_window import BudgetWindow
from cortex.accounts.limits.exceeded import limit_exceeded, rate_state
from cortex.accounts.limits.scope import Reserved, Scope, longest
from cortex.accounts.limits.terms import WHOLE_CONTEXT, KeyLimits, Limits, ModelTerms, TokenBound

UNKNOWN_CONTEXT: Final = 131072
"""Tokens of context of a model of which nothing is known."""
_FIELD_BYTES: Final = 40
"""A body that says how long its answer may be is longer by that field, and so is its bound."""
_FIELD: Final = "max_tokens; in /v1/responses max_output_tokens"


class ScopeTerms(NamedTuple):
    """One scope of a request. `label` is for people."""

    name: str
    label: str
    limits: Limits


def scopes_of(key_id: str, key_name: str, key: KeyLimits | None, model_id: str, model: Limits) -> list[ScopeTerms]:
    """The scopes whose limits hold for a request of this key (None: without limits) for this model."""
    found: list[ScopeTerms] = []
    if key is not None:
        if not key.total.unlimited:
            found.append(ScopeTerms(f"key:{key_id}", f"API key {key_name!r}", key.total))
        for glob, limits in key.by_models.items():
            if not limits.unlimited and fnmatchcase(model_id, glob):
                label = f"API key {key_name!r}, for models {glob!r},"
                found.append(ScopeTerms(f"key:{key_id}/{glob}", label, limits))
    if not model.unlimited:
        found.append(ScopeTerms(f"model:{model_id}", f"model {model_id!r}, for all API keys together,", model))
    return found


class RequestTerms:
    """What the requests of one key for one model are measured with."""

    def __init__(self, scopes: list[Scope], model: ModelTerms, valid_until: float) -> None:
        self.scopes = scopes
        self.valid_until = valid_until
        self._context: int = model.context or UNKNOWN_CONTEXT
        self._output: int = model.output or self._context
        self._input_price: float = model.prices.input / 1e6
        self._cached_price: float = model.prices.cached_input / 1e6
        self._output_price: float = model.prices.output / 1e6

    def most(self, bound: TokenBound) -> tuple[int, float]:
        """The tokens that a request may use at most, and their cost."""
        # Compiled, reading each field by itself, or both tuples in one assignment, takes several times as long.
        fields: tuple[int, int | None, int, int] = astuple(bound)
        prompt, output, answers, prompts = fields
        context = self._context
        if prompts == 1 and prompt > context:
            prompt = context
        if output is None:
            output = self._output
        output = min(output, context) * answers
        tokens = prompt + output
        if output and prompts == 1 and tokens > context * answers:
            tokens = max(prompt, context * answers)
        return tokens, prompt * self._input_price + output * self._output_price

    def cost(self, prompt: int, completion: int, cached: int) -> float:
        """The cost of the tokens that a request has used. `prompt` includes `cached`."""
        of_prompt = (prompt - cached) * self._input_price + cached * self._cached_price
        return of_prompt + completion * self._output_price

    def check(self, bound: TokenBound, tokens: int, cost: float, now: float) -> None:
        """Whether all scopes admit a request of this bound, which may use so much (`most`).

        Raises:
            LimitExceeded: a scope refuses it.
        """
        refused = False
        for scope in self.scopes:
            scope.advance(now)
            if scope.refuses(tokens, cost):
                refused = True
        if refused:
            found = [scope.refusal(tokens, cost) for scope in self.scopes]
            worst = longest([refusal for refusal in found if refusal is not None])
            made_of, advice = self._made_of(bound), self._advice(bound, worst.window)
            raise limit_exceeded(worst, rate_state(self.scopes), made_of=made_of, advice=advice)

    def _made_of(self, bound: TokenBound) -> str:
        """What the tokens of a refused request are, for people."""
        if bound.prompts == 1 and bound.prompt >= self._context:
            return "the model's whole context"
        if bound.output is None:
            return "its prompt and, as it does not limit its answer, the longest one"
        return "its prompt and the longest answer that it allows" if bound.output else "its prompt"

    def _advice(self, bound: TokenBound, window: BudgetWindow | None) -> str:
        """How a request gets within this budget that is larger than all of it."""
        if window is None:
            return ""
        if bound.prompt >= WHOLE_CONTEXT:
            if bound.prompts > 1:
                return "no budget admits images, audio or files here, because cortex cannot tell their tokens"
            return (
                "images, audio, files and earlier responses count as the model's whole context, so the budget must "
                "allow that much"
            )
        fits = self._longest_answer(bound, window)
        if fits > 0:
            return f"limit the answer to at most {fits} tokens ({_FIELD})"
        return "shorten the prompt" if bound.prompts == 1 else "send less text at a time"

    def _longest_answer(self, bound: TokenBound, window: BudgetWindow) -> int:
        """The longest answer with which the request is within the whole budget; 0 for none."""
        in_tokens = window.in_tokens
        prompt = bound.prompt + (_FIELD_BYTES if bound.output is None else 0)
        prompt = min(prompt, self._context) if bound.prompts == 1 else prompt
        left = window.amount - prompt * (1.0 if in_tokens else self._input_price)
        each = bound.answers * (1.0 if in_tokens else self._output_price)
        return int(left / each) if left > 0.0 and each > 0.0 and bound.output != 0 else 0

    def reserve(self, tokens: int, cost: float) -> HeldTokens:
        """Counts a request that all scopes admit."""
        held = HeldTokens(self, tokens, cost)
        for scope in self.scopes:
            held.tokens.append(scope.reserve(tokens, cost, held.budgets))
        return held


class HeldTokens:
    """What one admitted request has reserved: `tokens` from the token bucket of each scope, `budgets` from all their
    budgets."""

    def __init__(self, terms: RequestTerms, most_tokens: int, most_cost: float) -> None:
        self.scopes = terms.scopes
        self.terms = terms
        self.most_tokens = most_tokens
        self.most_cost = most_cost
        self.tokens: list[float] = []
        self.budgets: Reserved = []

    def settle(self, tokens: int, cost: float, now: float) -> None:
        """The request has ended and used so much."""
        place = 0
        for scope in self.scopes:
            scope.settle(self.tokens[place], tokens, now)
            place += 1  # noqa: SIM113 - compiled, enumerate costs more
        for window, amount in self.budgets:
            window.settle(amount, tokens if window.in_tokens else cost, now)

    def settle_estimate(self, tokens: int, cost: float, now: float) -> None:
        """The request has ended, and used about so much: at most what it has reserved."""
        self.settle(min(tokens, self.most_tokens), min(cost, self.most_cost), now)
