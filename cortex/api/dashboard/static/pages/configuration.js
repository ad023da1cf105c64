// What is in force and from where, what is wrong in the files, and what a reload would change.

import { html, useState } from "../html.js";
import { get, post } from "../api.js";
import { ago, plural } from "../format.js";
import { Confirm, Problem, useRead } from "../parts.js";

const shown = (value) => (value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value));

function Found({ kind, problem }) {
  return html`<li class=${kind === "error" ? "problem" : ""}><strong>${kind === "error" ? html`<span aria-hidden="true">✕ </span>Error` : "Warning"}</strong>${problem.file ? html` in <code>${problem.file}</code>` : ""}: ${problem.message}</li>`;
}

function Files({ found }) {
  const { errors, warnings } = found;
  return html`<section class="card" aria-label="The files now">
    <h2>The files now</h2>
    ${errors.length || warnings.length ? null : html`<p>Nothing is wrong in the files.</p>`}
    <ul>${errors.map((problem) => html`<${Found} kind="error" problem=${problem} />`)}${warnings.map((problem) => html`<${Found} kind="warning" problem=${problem} />`)}</ul>
    ${errors.length ? html`<p>The configuration from before stays in force. Fix the file: cortex reads it again when it changes.</p>` : null}
  </section>`;
}

function Outlook({ outlook, ask }) {
  const { possible, changes, restart } = outlook;
  return html`<section class="card" aria-label="A reload">
    <div class="row"><h2>A reload</h2><span class="grow"></span>${possible && html`<button class="quiet" onClick=${ask}>Reload</button>`}</div>
    <${Changes} outlook=${outlook} />
    ${possible && !changes.length && !restart.length ? html`<p>It would change nothing: the files are in force.</p>` : null}
  </section>`;
}

function Changes({ outlook }) {
  const { possible, changes, restart } = outlook;
  if (!possible) return html`<p>It would change nothing as long as the files have errors.</p>`;
  return html`${changes.length ? html`<p>It would change:</p><ul>${changes.map((change) => html`<li><code>${change}</code></li>`)}</ul>` : null}
    ${restart.length ? html`<p>These changes wait for a restart of cortex:</p><ul>${restart.map((change) => html`<li><code>${change}</code></li>`)}</ul>` : null}`;
}

function Settings({ found, all, setAll, search }) {
  const wanted = search.toLowerCase();
  const settings = found.settings.filter((setting) => (all || !setting.default) && setting.key.toLowerCase().includes(wanted));
  return html`<section class="card" aria-label="In force">
    <h2>In force</h2>
    <p class="small">From ${found.files.map((file, index) => html`${index ? " and " : ""}<code>${file}</code>`)}, loaded ${ago(found.loaded_at)}.${found.environment.length ? ` Overridden by ${found.environment.join(", ")}.` : ""}</p>
    <label><input type="checkbox" checked=${all} onChange=${(event) => setAll(event.target.checked)} /> also keys with their default</label>
    ${settings.length ? html`<div class="wide" tabindex="0" role="region" aria-label="Keys"><table>
      <thead><tr><th scope="col" class="text">Key</th><th scope="col" class="text">Value</th><th scope="col" class="text">A change</th></tr></thead>
      <tbody>${settings.map((setting) => html`<tr><th scope="row">${setting.key}</th><td class="text">${shown(setting.value)}${setting.default ? html` <span class="small">(default)</span>` : ""}</td><td class="text">${setting.needs_restart ? "needs a restart" : "applies"}</td></tr>`)}</tbody>
    </table></div>` : html`<p>No key differs from its default.</p>`}
    <${Entries} title="Neurons" entries=${found.neurons} nameOf=${(entry) => entry.name} />
    <${Entries} title="Models" entries=${found.models} nameOf=${(entry) => entry.id} />
    <${Entries} title="Aliases" entries=${Object.entries(found.aliases)} nameOf=${([name]) => name} contentOf=${([, value]) => value} />
  </section>`;
}

function Entries({ title, entries, nameOf, contentOf = (entry) => entry }) {
  if (!entries.length) return null;
  return html`<details><summary>${title} (${entries.length})</summary>
    ${entries.map((entry) => html`<h3>${nameOf(entry)}</h3><pre tabindex="0">${JSON.stringify(contentOf(entry), null, 2)}</pre>`)}
  </details>`;
}

function Configuration({ fleet, search }) {
  const [asked, ask] = useState(false);
  const [all, setAll] = useState(false);
  const { loaded_at: loadedAt, error: refused } = fleet.configuration ?? {};
  const [found, error, again] = useRead((signal) => get("/fleet/configuration", signal), [loadedAt, refused]);
  if (!found) return error ? html`<${Problem} error=${error} />` : html`<p role="status">Reading the files …</p>`;
  const { changes, restart } = found.reload;
  return html`<${Problem} error=${error} />
    <div class="row"><span class="small">${plural(found.neurons.length, "neuron")}, ${plural(found.models.length, "model")}</span><span class="grow"></span><button class="quiet" onClick=${again}>Read the files again</button></div>
    <${Files} found=${found} />
    <${Outlook} outlook=${found.reload} ask=${() => ask(true)} />
    <${Settings} found=${found} all=${all} setAll=${setAll} search=${search} />
    ${asked && html`<${Confirm} title="Reload the configuration?" verb="Reload" consequence=${changes.length || restart.length ? html`<${Changes} outlook=${found.reload} />` : html`<p>Nothing would change.</p>`} act=${() => post("/fleet/configuration/reload").then(again)} onClose=${() => ask(false)} />`}`;
}

export function ConfigurationPage({ fleet, search, mayConfigure }) {
  return html`<h1>Configuration</h1>
    ${mayConfigure ? html`<${Configuration} fleet=${fleet} search=${search} />` : html`<p>It needs a key with the role admin.</p>`}`;
}
