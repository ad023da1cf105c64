// Who used what: by key, model and day; tokens, money and energy.

import { html, useEffect, useState } from "../html.js";
import { get } from "../api.js";
import { count, secs } from "../format.js";
import { Problem, useRead } from "../parts.js";

const GROUPS = ["key", "model", "day", "node", "status"];
const REFRESH_MS = 10000;
const PERIODS = { "24 hours": "24h", "7 days": "7d", "30 days": "30d" };

export function UsagePage() {
  const [groups, setGroups] = useState(["key", "model"]);
  const [period, setPeriod] = useState("7 days");
  const by = GROUPS.filter((group) => groups.includes(group));
  const query = new URLSearchParams({ from: PERIODS[period], ...(by.length ? { group_by: by.join(",") } : {}) });
  const [report, error, again] = useRead((signal) => get(`/usage?${query}`, signal), [query.toString()]);
  useEffect(() => {
    const timer = setInterval(again, REFRESH_MS);
    return () => clearInterval(timer);
  }, []);
  const toggle = (group) => setGroups(groups.includes(group) ? groups.filter((each) => each !== group) : [...groups, group]);
  const money = (value) => (value ? `${value.toFixed(value < 1 ? 4 : 2)} ${report.currency}` : "–");
  const cells = (row) => html`<td>${count(row.requests)}</td><td>${count(row.errors)}</td><td>${count(row.prompt_tokens)}</td><td>${count(row.cached_tokens)}</td><td>${count(row.completion_tokens)}</td><td>${money(row.cost)}</td><td>${row.energy_wh ? `${row.energy_wh.toFixed(row.energy_wh < 10 ? 2 : 0)} Wh` : "–"}</td><td>${secs(row.first_byte_secs_p95)}</td>`;
  return html`<h1>Usage</h1>
    <div class="row" role="group" aria-label="Period">${Object.keys(PERIODS).map((name) => html`<button class=${name === period ? "" : "quiet"} aria-pressed=${name === period} onClick=${() => setPeriod(name)}>${name}</button>`)}</div>
    <fieldset class="row"><legend>Group by</legend>${GROUPS.map((group) => html`<label><input type="checkbox" checked=${groups.includes(group)} onChange=${() => toggle(group)} /> ${group}</label>`)}</fieldset>
    <${Problem} error=${error} />
    ${report && html`<div class="wide" tabindex="0" role="region" aria-label="Usage table"><table>
      <thead><tr>${report.group_by.map((group) => html`<th scope="col" class="text">${group}</th>`)}<th scope="col">requests</th><th scope="col">errors</th><th scope="col">prompt tokens</th><th scope="col">cached</th><th scope="col">completion tokens</th><th scope="col">cost</th><th scope="col">energy</th><th scope="col">first byte, p95</th></tr></thead>
      <tbody>${report.rows.map((row) => html`<tr>${report.group_by.map((group) => html`<th scope="row">${row[group] === "" ? "none" : String(row[group])}</th>`)}${cells(row)}</tr>`)}</tbody>
      <tfoot><tr>${report.group_by.length ? html`<th scope="row" colspan=${report.group_by.length}>all</th>` : null}${cells(report.totals)}</tr></tfoot>
    </table></div>`}`;
}
