// What a model's engines write, as it comes.

import { html, useEffect, useRef, useState } from "../html.js";
import { events } from "../api.js";
import { Problem, useChoice } from "../parts.js";

const MOST_LINES = 2000;
const TAIL = 200;

function told(event) {
  if (event.end) return event.node ? `– ${event.node}: ${event.end} –` : `– ${event.end} –`;
  if (event.left_out) return `– ${event.left_out} lines were left out –`;
  return event.line;
}

// The lines of the chosen model, newest last, until the page is left or another is chosen.
function useLines(model) {
  const [lines, setLines] = useState([]);
  const [error, setError] = useState(null);
  useEffect(() => {
    if (!model) return undefined;
    const abort = new AbortController();
    let pending = [];
    const flush = () => {
      if (!pending.length) return;
      const more = pending;
      pending = [];
      setLines((before) => [...before, ...more].slice(-MOST_LINES));
    };
    const timer = setInterval(flush, 200);
    const read = async () => {
      setLines([]);
      setError(null);
      try {
        const path = `/fleet/logs?model=${encodeURIComponent(model)}&tail=${TAIL}&follow=true`;
        for await (const event of events("GET", path, { signal: abort.signal })) {
          if (event.data) pending.push(told(JSON.parse(event.data)));
        }
        pending.push("– end –");
      } catch (failed) {
        if (failed.name !== "AbortError") setError(failed);
      }
    };
    read();
    return () => {
      clearInterval(timer);
      abort.abort();
    };
  }, [model]);
  return [lines, error];
}

export function LogsPage({ fleet, search }) {
  const models = [...new Set(Object.values(fleet.nodes).flatMap((node) => Object.values(node.models ?? {}).map((view) => view.id)))].sort();
  const [chosen, choose] = useChoice("model");
  const model = models.includes(chosen) ? chosen : (models[0] ?? "");
  const [lines, error] = useLines(model);
  const [follows, setFollows] = useState(true);
  const box = useRef(null);
  const wanted = search.toLowerCase();
  const shown = wanted ? lines.filter((line) => line.toLowerCase().includes(wanted)) : lines;
  useEffect(() => {
    if (follows && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [shown.length, follows]);
  if (!models.length) return html`<h1>Logs</h1><p>No host has an engine, so there is no log.</p>`;
  return html`<h1>Logs</h1>
    <div class="row">
      <label for="model">Model</label>
      <select id="model" value=${model} onChange=${(event) => choose(event.target.value)}>${models.map((name) => html`<option value=${name}>${name}</option>`)}</select>
      <label><input type="checkbox" checked=${follows} onChange=${(event) => setFollows(event.target.checked)} /> Follow</label>
      ${wanted && html`<span class="small">${shown.length} of ${lines.length} lines</span>`}
    </div>
    <${Problem} error=${error} />
    <pre class="log" ref=${box} tabindex="0" role="log" aria-label=${`Log of ${model}`}>${shown.join("\n")}</pre>`;
}
