// The requests: those that run and the last that ended, and for each where its time went.

import { html, useEffect, useRef, useState } from "../html.js";
import { get } from "../api.js";
import { clock, count, plural, secs } from "../format.js";
import { Problem, useChoice } from "../parts.js";

// Asked again each second while the page is seen, and only for what is new. Not a stream of events: workers would have
// to tell of each request, thousands a second, for a page that people read once a second.
const REFRESH_MS = 1000;
const SHOWN = 200;

const CHOICES = {
  only: "the only engine that could be used",
  prefix: "its session, or the beginning of its prompt, belongs to this engine",
  least_busy: "the engine with the least work",
  control: "chosen after a wait, or after another engine failed",
  loaded: "loaded for it",
  maker: "this engine has the response",
};
const KINDS = { unload: "unloading", load: "loading" };

const isError = (each) => Boolean(each.error) || each.status >= 400;

// [sign, kind, words]: a state is told by a sign and a word, never by colour alone.
function stateOf(each) {
  if (each.stage) return [each.stage === "answering" ? "▶" : "◐", "busy", each.stage];
  if (each.status === 499 && !each.error) return ["◌", "warn", "499 the client left"];
  if (isError(each)) return ["✕", "bad", `${each.status} ${each.error ?? "error of the engine"}`];
  return each.complete ? ["●", "good", String(each.status)] : ["◌", "warn", `${each.status} the client left`];
}

function useRequests(query) {
  const [state, setState] = useState({ live: [], liveCount: 0, ended: [], known: false });
  const [error, setError] = useState(null);
  const place = useRef("");
  useEffect(() => {
    const abort = new AbortController();
    let timer = null;
    place.current = "";
    const read = async () => {
      if (!document.hidden) {
        try {
          const answer = await get(`/fleet/requests?${query}${place.current ? `&since=${place.current}` : ""}`, abort.signal);
          place.current = answer.place;
          setState((before) => ({
            live: answer.live,
            liveCount: answer.live_count,
            ended: answer.whole ? answer.ended : [...answer.ended, ...before.ended].slice(0, SHOWN),
            known: true,
          }));
          setError(null);
        } catch (failed) {
          if (failed.name === "AbortError") return;
          setError(failed);
        }
      }
      timer = setTimeout(read, REFRESH_MS);
    };
    read();
    return () => {
      abort.abort();
      clearTimeout(timer);
    };
  }, [query]);
  return [state, error];
}

function stepName(step) {
  const name = KINDS[step.kind] ? `${KINDS[step.kind]}: ${step.name}` : step.name;
  return `${step.kind === "failed" ? "failed: " : ""}${name}${step.node ? ` on ${step.node}` : ""}`;
}

function Waterfall({ each }) {
  if (!each.steps.length) return null;
  const total = Math.max(each.secs, 0.001);
  return html`<ol class="waterfall" aria-label="Where its time went">
    ${each.steps.map((step) => {
      const took = secs(step.until - step.since);
      const from = (1000 * Math.max(0, step.since)) / total;
      const width = Math.max(3, (1000 * (step.until - step.since)) / total);
      return html`<li class="step ${step.kind}">
        <span>${stepName(step)}</span>
        <svg viewBox="0 0 1000 12" preserveAspectRatio="none" aria-hidden="true"><rect class="part" x=${Math.min(from, 997)} width=${width} height="12" /></svg>
        <span class="numbers">${took}<span class="hidden"> from ${secs(step.since)}</span></span>
      </li>`;
    })}
  </ol>`;
}

function Detail({ each, id }) {
  const tokens = each.prompt_tokens === undefined || each.prompt_tokens === null ? null : `${count(each.prompt_tokens)} prompt${each.cached_tokens ? ` (${count(each.cached_tokens)} cached)` : ""}, ${count(each.completion_tokens)} completion`;
  const facts = [
    ["Path", each.path + (each.streamed ? ", streamed" : "")],
    ["Asked for", each.asked !== each.model && each.asked],
    ["Variant", each.variant],
    ["Engine", each.node && [each.node, each.instance].filter(Boolean).join("/")],
    ["Why there", CHOICES[each.choice]],
    ["Cold start", each.cold && "yes"],
    ["Waited", each.queued_secs >= 0.001 && secs(each.queued_secs)],
    ["First byte after", each.first_byte_secs !== null && secs(each.first_byte_secs)],
    ["Tokens", tokens],
    ["Now", each.note],
    ["Error", each.message],
    ["Request id", html`<code>${each.id}</code>`],
  ];
  return html`<div class="detail" id=${id}>
    <dl class="facts">${facts.filter(([, value]) => value).map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>
    <${Waterfall} each=${each} />
  </div>`;
}

function Row({ name, each, open, toggle }) {
  const [sign, kind, words] = stateOf(each);
  const id = `request-${name}`;
  const failed = each.attempts.length ? `after ${plural(each.attempts.length, "failed engine")}` : "";
  return html`<li class="request" aria-label=${`Request ${each.id}`}>
    <button class="quiet" aria-expanded=${open} aria-controls=${open ? id : undefined} onClick=${toggle}>
      <span class="numbers">${clock(each.started)}</span>
      <span class="status ${kind}"><span aria-hidden="true">${sign} </span>${words}</span>
      <span class="model">${each.model || "no model"}</span>
      <span class="place">${[each.node || "no engine", each.cold && "cold start", failed].filter(Boolean).join(", ")}</span>
      <span>${each.key}</span>
      <span class="numbers">${secs(each.secs)}</span>
    </button>
    ${open && html`<${Detail} each=${each} id=${id} />`}
  </li>`;
}

// Clients may use an id twice: each row has a name of its own, which it keeps when newer requests come.
function named(list) {
  const times = new Map();
  const names = [...list].reverse().map(({ id }) => {
    times.set(id, (times.get(id) ?? 0) + 1);
    return `${id}-${times.get(id)}`;
  });
  return list.map((each, index) => ({ name: names[list.length - 1 - index], each }));
}

const matches = (each, wanted) => !wanted || [each.id, each.model, each.asked, each.node, each.key, each.path, each.error, each.status].some((text) => String(text ?? "").toLowerCase().includes(wanted));

export function RequestsPage({ fleet, search }) {
  const [model, setModel] = useChoice("model");
  const [status, setStatus] = useChoice("status");
  const errors = status === "error";
  const [open, setOpen] = useState(null);
  const query = new URLSearchParams({ limit: SHOWN, ...(model ? { model } : {}), ...(errors ? { status: "error" } : {}) });
  const [{ live, liveCount, ended, known }, error] = useRequests(query.toString());
  const wanted = search.toLowerCase();
  const row = ({ name, each }) => html`<${Row} key=${name} name=${name} each=${each} open=${open === name} toggle=${() => setOpen(open === name ? null : name)} />`;
  const [nowShown, thenShown] = [live, ended].map((list) => named(list).filter(({ each }) => matches(each, wanted)));
  return html`<h1>Requests</h1>
    <div class="row">
      <label for="requests-model">Model</label>
      <select id="requests-model" value=${model} onChange=${(event) => setModel(event.target.value)}>
        <option value="">all</option>${[...new Set([...Object.keys(fleet.models), ...(model ? [model] : [])])].sort().map((name) => html`<option value=${name}>${name}</option>`)}
      </select>
      <label><input type="checkbox" checked=${errors} onChange=${(event) => setStatus(event.target.checked ? "error" : "")} /> Only errors</label>
    </div>
    <${Problem} error=${error} />
    ${errors ? null : html`<h2>Live</h2>
      <p class="small" role="status">${known ? plural(liveCount, "request") : "Reading …"}${liveCount > live.length ? `, of which the ${live.length} oldest are shown` : ""}</p>
      <ul class="requests" aria-label="Live requests">${nowShown.map(row)}</ul>`}
    <h2>Ended</h2>
    ${known && !thenShown.length ? html`<p class="small">None${errors || model || wanted ? " that fits" : " since cortex started"}.</p>` : null}
    <ul class="requests" aria-label="Ended requests">${thenShown.map(row)}</ul>`;
}
