// Each host with its GPUs: whose memory it is, how busy and how warm it is, and what is wrong.

import { html, useState } from "../html.js";
import { post } from "../api.js";
import { ago, mib, percent, plural } from "../format.js";
import { Bar, Confirm, Status, modelClass } from "../parts.js";

// The parts of a device's memory, largest owner first.
export function memoryOf(node, device) {
  const total = device.vram_total_mb ?? 0;
  const parts = [];
  let known = 0;
  for (const view of Object.values(node.models ?? {})) {
    const devices = view.devices ?? [];
    if (!devices.includes(device.index) || view.status === "unloaded" || view.status === "failed") continue;
    const whole = view.status === "sleeping" ? view.vram_used_mb : (view.vram_booked_mb ?? view.vram_used_mb);
    const value = (whole ?? 0) / devices.length;
    known += value;
    parts.push({ label: view.id, value, kind: modelClass(view.id) });
  }
  parts.sort((one, two) => two.value - one.value);
  const foreign = device.vram_foreign_mb ?? 0;
  if (foreign) parts.push({ label: "other processes", value: foreign, kind: "foreign" });
  const used = device.vram_used_mb ?? 0;
  const rest = Math.max(device.vram_booked_mb ?? 0, used - foreign) - known;
  if (rest > 1) parts.push({ label: "reserved", value: rest, kind: "reserved" });
  const free = total - parts.reduce((sum, part) => sum + part.value, 0);
  return { parts, total, free: Math.max(0, free) };
}

function Device({ node, device }) {
  const { parts, total, free } = memoryOf(node, device);
  const wrong = [device.lost, device.fault, ...(device.warnings ?? [])].filter(Boolean);
  return html`<div class="device">
    <div class="row">
      <strong>${device.index}: ${device.name}</strong>
      <span class="numbers">${percent(device.utilization_pct)} busy · ${device.temp_c === undefined ? "–" : `${Math.round(device.temp_c)} °C`} · ${device.power_w === undefined ? "–" : `${Math.round(device.power_w)} W`}</span>
    </div>
    <${Bar} parts=${parts} total=${total} label=${`Memory of GPU ${device.index} of ${node.name}`} />
    <div class="legend">
      ${parts.map((part) => html`<span><span class="swatch ${part.kind}" aria-hidden="true"></span>${part.label} ${mib(part.value)}</span>`)}
      <span>${mib(free)} free of ${mib(total)}</span>
    </div>
    ${wrong.map((reason) => html`<p class="problem"><span aria-hidden="true">✕ </span>${reason}</p>`)}
  </div>`;
}

function links(node) {
  const told = (node.links ?? []).map((link) => `${link.a}–${link.b} ${link.kind}${link.nvlinks ? ` ×${link.nvlinks}` : ""}`);
  return told.length ? html`<details><summary>Links between GPUs</summary><p class="small">${told.join(", ")}</p></details>` : null;
}

function Node({ node, mayAct, ask }) {
  const status = node.healthy ? (node.draining ? "draining" : "healthy") : "down";
  const engines = Object.values(node.models ?? {}).filter((view) => view.status !== "unloaded");
  return html`<section class="card" role="listitem" aria-label=${`Host ${node.name}`}>
    <div class="row">
      <h2>${node.name}</h2>
      <${Status} status=${status} title=${node.last_error} />
      <span class="small">${node.healthy ? `up ${ago(node.up_since).replace(" ago", "")}, neuron ${node.version ?? "?"}${node.simulated ? ", simulated" : ""}` : `silent for ${ago(node.silent_since).replace(" ago", "")}`}</span>
      <span class="grow"></span>
      ${mayAct && (node.draining ? html`<button class="quiet" onClick=${() => ask({ verb: "Resume", node })}>Resume</button>` : html`<button class="quiet" onClick=${() => ask({ verb: "Drain", node })}>Drain</button>`)}
    </div>
    ${node.last_error && !node.healthy && html`<p class="problem"><span aria-hidden="true">✕ </span>${node.last_error}</p>`}
    ${node.cuda_unavailable_reason && html`<p class="problem">${node.cuda_unavailable_reason}</p>`}
    ${Object.values(node.devices ?? {}).map((device) => html`<${Device} key=${device.index} node=${node} device=${device} />`)}
    ${node.host && html`<p class="small">RAM ${mib(node.host.ram_used_mb)} of ${mib(node.host.ram_total_mb)}</p>`}
    ${links(node)}
    <ul class="engines">
      ${engines.map((view) => html`<li><${Status} status=${node.healthy ? view.status : "unknown"} title=${view.error ?? view.reason} /> ${view.id}${view.variant ? ` (${view.variant})` : ""}${view.progress ? ` – ${view.progress.phase} ${percent((view.progress.overall ?? view.progress.fraction ?? 0) * 100)}` : ""}${view.error ? html` <span class="small line">${view.error.split("\n")[0]}</span>` : ""}</li>`)}
    </ul>
  </section>`;
}

// The requests that run on the host, and the models of which no other host that takes requests has an engine.
function onlyOn(node, fleet) {
  const has = (other) => Object.values(other.models ?? {}).filter((view) => view.status !== "unloaded" && view.status !== "failed").map((view) => view.id);
  const others = new Set(Object.values(fleet.nodes).filter((other) => other.name !== node.name && other.healthy && !other.draining).flatMap(has));
  const here = [...new Set(has(node))];
  const running = Object.values(fleet.in_flight).filter((each) => each.node === node.name && here.includes(each.model)).reduce((sum, each) => sum + each.count, 0);
  return { running, models: here.filter((model) => !others.has(model)) };
}

function Drained({ node, fleet }) {
  const { running, models } = onlyOn(node, fleet);
  return html`<p>New loads go to other hosts, and requests too where another host can serve them. What runs on <strong>${node.name}</strong> goes on: ${plural(running, "request")} now.</p>
    ${models.length ? html`<p>No other host has ${models.join(", ")}. Their requests still go to ${node.name}, until one that is busy has been loaded elsewhere.</p>` : null}`;
}

const CONSEQUENCES = {
  Drain: (node, fleet) => html`<${Drained} node=${node} fleet=${fleet} />`,
  Resume: (node) => html`<p><strong>${node.name}</strong> takes loads and requests again.</p>`,
};

export function FleetPage({ fleet, mayAct, search }) {
  const [asked, ask] = useState(null);
  const wanted = search.toLowerCase();
  const nodes = Object.values(fleet.nodes).filter((node) => !wanted || node.name.toLowerCase().includes(wanted) || Object.values(node.models ?? {}).some((view) => view.id.toLowerCase().includes(wanted)));
  const healthy = nodes.filter((node) => node.healthy).length;
  return html`<h1>Fleet</h1>
    <p class="small">${plural(nodes.length, "host")}, ${healthy} healthy${Object.keys(fleet.nodes).length ? "" : ". List neurons in cortex.toml, or let cortex find them ([discovery])"}</p>
    <div role="list" aria-label="Hosts">${nodes.map((node) => html`<${Node} key=${node.name} node=${node} mayAct=${mayAct} ask=${ask} />`)}</div>
    ${asked && html`<${Confirm} title=${`${asked.verb} ${asked.node.name}?`} verb=${asked.verb} consequence=${CONSEQUENCES[asked.verb](asked.node, fleet)} act=${() => post(`/fleet/nodes/${encodeURIComponent(asked.node.name)}/${asked.verb.toLowerCase()}`)} onClose=${() => ask(null)} />`}`;
}
