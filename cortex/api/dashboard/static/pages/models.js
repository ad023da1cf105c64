// Every model: where it is, who uses it, what is being loaded and why, and what an operator can do about it.

import { html, useState } from "../html.js";
import { post } from "../api.js";
import { ago, clock, compareNames, plural, secs } from "../format.js";
import { Confirm, Problem, Status, linkTo, modelClass, useChoice, useRead } from "../parts.js";

export function modelsOf(fleet) {
  const rows = new Map();
  const row = (id) => {
    if (!rows.has(id)) rows.set(id, { id, profile: fleet.models[id] ?? null, engines: [], loads: [], inFlight: 0, waiting: null, held: [], rate: fleet.rates?.[id] ?? null, lastUsed: fleet.last_used?.[id] ?? null });
    return rows.get(id);
  };
  Object.keys(fleet.models).forEach(row);
  for (const node of Object.values(fleet.nodes)) {
    for (const view of Object.values(node.models ?? {})) row(view.id).engines.push({ node, view });
  }
  Object.values(fleet.loads).forEach((load) => row(load.model).loads.push(load));
  Object.values(fleet.in_flight).forEach((each) => (row(each.model).inFlight += each.count));
  Object.values(fleet.waiting).forEach((each) => (row(each.model).waiting = each));
  Object.values(fleet.held).forEach((each) => row(each.model).held.push(each));
  return [...rows.values()].sort((one, two) => compareNames(one.id, two.id));
}

function rateText(rate) {
  const parts = [`${rate.requests_per_sec.toFixed(1)} requests/s`, `${Math.round(rate.completion_tokens_per_sec)} tokens/s`];
  if (rate.first_byte_secs) parts.push(`first byte after ${secs(rate.first_byte_secs)}`);
  if (rate.errors_per_sec) parts.push(`${rate.errors_per_sec.toFixed(1)} errors/s`);
  return parts.join(", ");
}

function Progress({ node, view }) {
  const { progress } = view;
  if (!progress) return null;
  const overall = progress.overall ?? progress.fraction;
  return html`<div class="progress">
    <progress max="1" value=${overall ?? undefined} aria-label=${`Load of ${view.id} on ${node.name}`}></progress>
    <span class="small">${progress.phase}${overall === undefined || overall === null ? "" : ` ${Math.round(overall * 100)} %`}${progress.remaining_secs ? `, ${secs(progress.remaining_secs)} left` : ""}${progress.message ? ` – ${progress.message}` : ""}</span>
  </div>`;
}

// What an operator can do to an engine, by its status. One that spans several neurons can only be unloaded.
const ACTIONS = { loaded: ["Sleep", "Restart"], sleeping: ["Wake", "Restart"], failed: ["Restart"] };

function Engine({ node, view, row, mayAct, ask }) {
  const verbs = (mayAct && node.healthy && !view.group && ACTIONS[view.status]) || [];
  return html`<li>
    <${Status} status=${node.healthy ? view.status : "unknown"} title=${node.healthy ? view.reason : "its host does not answer"} /> on ${node.name}
    <span class="small">
      ${view.devices?.length ? ` ${view.devices.length > 1 ? "GPUs" : "GPU"} ${view.devices.join(" and ")}` : view.status === "failed" ? "" : " CPU"}${view.variant ? `, ${view.variant}` : ""}${view.activity ? `; ${view.activity.in_flight ?? 0} running, ${view.activity.queue_depth ?? 0} queued in the engine` : ""}${view.since ? `; for ${ago(view.since).replace(" ago", "")}` : ""}
    </span>
    ${verbs.map((verb) => html` <button class="quiet" aria-label=${`${verb} ${view.id} on ${node.name}${view.instance ? ` #${view.instance}` : ""}`} onClick=${() => ask({ verb, row, node, view })}>${verb}</button>`)}
    <${Progress} node=${node} view=${view} />
    ${view.error && html`<p class="problem"><span aria-hidden="true">✕ </span>${view.error.split("\n")[0]}</p>`}
  </li>`;
}

function Model({ row, aliases, mayAct, ask }) {
  const present = row.engines.filter(({ view }) => view.status !== "unloaded");
  const isThere = present.some(({ view }) => view.status !== "failed");
  const names = Object.keys(aliases).filter((name) => aliases[name] === row.id);
  return html`<section class="card" aria-label=${`Model ${row.id}`}>
    <div class="row">
      <h2><span class="swatch ${modelClass(row.id)}" aria-hidden="true"></span>${row.id}</h2>
      <span class="small">${names.length ? `also ${names.join(", ")}` : ""}</span>
      <span class="grow"></span>
      <a href=${linkTo("requests", { model: row.id })} aria-label=${`Requests for ${row.id}`}>Requests</a>
      ${mayAct && present.length ? html`<a href=${linkTo("logs", { model: row.id })} aria-label=${`Logs of ${row.id}`}>Logs</a>` : null}
      ${mayAct && html`<button class="quiet" onClick=${() => ask({ verb: "Load", row })}>Load</button>`}
      ${mayAct && isThere && html`<button class="quiet" onClick=${() => ask({ verb: "Unload", row })}>Unload</button>`}
    </div>
    <p class="small">${plural(row.inFlight, "request")} running${row.waiting ? html`, <strong>${row.waiting.count} waiting</strong>${row.waiting.for ? ` ${row.waiting.for}` : ""}` : ""}${row.lastUsed && !row.inFlight ? `, last used ${ago(row.lastUsed)}` : ""}${present.length ? "" : ", on no host"}${row.rate ? html`. ${rateText(row.rate)}` : ""}</p>
    <ul class="engines">${present.map(({ node, view }) => html`<${Engine} key=${`${node.name} ${view.instance}`} node=${node} view=${view} row=${row} mayAct=${mayAct} ask=${ask} />`)}</ul>
    ${row.loads.map((load) => html`<p class="small">Loading on ${load.node}, begun ${ago(load.started)}: ${load.phase}. ${load.because ? `Why: ${load.because}.` : ""} ${load.evict.length ? `Displaces ${load.evict.join(", ")}.` : ""}</p>`)}
    ${row.held.map((held) => html`<p class="small">Held back${held.node ? ` on ${held.node}` : ""} until ${clock(held.until)}.</p>`)}
  </section>`;
}

const bodyOf = ({ row, node, view }) => ({ model: row.id, ...(node && { node: node.name }), ...(view?.instance && { instance: view.instance }) });

// What the action would do now: cortex is asked without doing it.
function Effects({ asked }) {
  const { verb, row, node, view } = asked;
  const [plan, error] = useRead((signal) => post(`/fleet/${verb.toLowerCase()}?dry_run=true`, bodyOf(asked), signal), [verb, row.id, node?.name, view?.instance]);
  if (error) return html`<${Problem} error=${error} />`;
  if (!plan) return html`<p>Asking cortex …</p>`;
  const displaces = (effect) => plan.evict.some((model) => effect.startsWith(`Displaces ${model} `));
  return html`<ul>${plan.effects.map((effect) => html`<li>${displaces(effect) ? html`<strong>${effect}</strong>` : effect}</li>`)}</ul>`;
}

const WITHOUT_WAIT = ["Load", "Restart"];

export function ModelsPage({ fleet, mayAct, search }) {
  const [asked, ask] = useState(null);
  const wanted = search.toLowerCase();
  const [only, setOnly] = useChoice("only");
  const isPresent = (row) => row.loads.length || row.waiting || row.engines.some(({ view }) => view.status !== "unloaded");
  const all = modelsOf(fleet);
  const rows = all.filter((row) => row.id.toLowerCase().includes(wanted) && (only !== "present" || isPresent(row)));
  const act = (action) => post(`/fleet/${action.verb.toLowerCase()}${WITHOUT_WAIT.includes(action.verb) ? "?wait=false" : ""}`, bodyOf(action));
  return html`<h1>Models</h1>
    <label><input type="checkbox" checked=${only === "present"} onChange=${(event) => setOnly(event.target.checked ? "present" : "")} /> Only those on a host or waited for</label>
    <p class="small">${rows.length === all.length ? plural(all.length, "model") : `${rows.length} of ${plural(all.length, "model")}`}${all.length ? "" : ": models.toml lists none, and no host has one"}</p>
    ${rows.map((row) => html`<${Model} key=${row.id} row=${row} aliases=${fleet.aliases} mayAct=${mayAct} ask=${ask} />`)}
    ${asked && html`<${Confirm} title=${`${asked.verb} ${asked.row.id}${asked.node ? ` on ${asked.node.name}` : ""}?`} verb=${asked.verb} consequence=${html`<${Effects} asked=${asked} />`} act=${() => act(asked)} onClose=${() => ask(null)} />`}`;
}
