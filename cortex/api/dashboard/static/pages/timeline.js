// Which model was where: a row for each GPU, a span for each stay, swaps and failures on it, and below how many waited.

import { html, useEffect, useMemo, useRef, useState } from "../html.js";
import { get } from "../api.js";
import { clock, compareNames, secs } from "../format.js";
import { Problem, Status, modelClass, useChoice, useRead } from "../parts.js";
import uPlot from "../vendor/uplot.js";

const RANGES = { "15 min": 900, "1 h": 3600, "6 h": 21600, "24 h": 86400 };
const REFRESH_MS = 5000;
const WIDTH = 1000;
const ROW = 22;
const HEIGHT = 180;
const STEPS = [1, 2, 5].flatMap((step) => [0, 1, 2, 3, 4, 5].map((power) => step * 10 ** power)).sort((one, two) => one - two);

const labelsOf = (nodes) => nodes.flatMap((node) => Object.keys(node.devices ?? {}).map((index) => `${node.name} ${index}`));

// Rows of the picture: node and GPU, each with its spans. What held for the whole node, and engines without a GPU, such as
// failed ones, have rows of their own.
export function rowsOf(spans, labels) {
  const rows = new Map(labels.map((label) => [label, { label, spans: [] }]));
  for (const span of spans) {
    const devices = !span.model ? ["host"] : span.devices?.length ? span.devices : ["no GPU"];
    for (const device of devices) {
      const label = `${span.node} ${device}`;
      if (!rows.has(label)) rows.set(label, { label, spans: [] });
      rows.get(label).spans.push(span);
    }
  }
  return [...rows.values()].map(withLanes).sort((one, two) => compareNames(one.label, two.label));
}

// Models that share a GPU stand below each other. The clocks of cortex and of a host differ a little: what follows on a
// span of the same model stays behind it.
const SAME_SECS = 3;

function withLanes({ label, spans }) {
  const last = [];
  const fits = (before, span) => (before.until ?? Infinity) <= span.since + (before.model === span.model ? SAME_SECS : 0);
  const placed = [...spans].sort((one, two) => one.since - two.since).map((span) => {
    const free = last.findIndex((before) => fits(before, span));
    const lane = free < 0 ? last.length : free;
    last[lane] = span;
    return { span, lane };
  });
  return { label, placed, lanes: Math.max(1, last.length) };
}

function told(span, now) {
  const end = span.until ?? now;
  const facts = [`${span.model || span.node} ${span.status}`, `${clock(span.since)} to ${span.until ? clock(span.until) : "now"} (${secs(end - span.since)})`];
  if (span.why) facts.push(`why: ${span.why}`);
  if (span.displaces?.length) facts.push(`displaced ${span.displaces.join(", ")}`);
  if (span.displaced_by) facts.push(`displaced for ${span.displaced_by}`);
  if (span.error) facts.push(span.error.split("\n")[0]);
  for (const [index, [phase, since]] of (span.phases ?? []).entries()) {
    const next = span.phases[index + 1]?.[1] ?? end;
    facts.push(`${phase} ${secs(next - since)}`);
  }
  return facts.join(" · ");
}

function Picture({ rows, since, until, choose }) {
  const scale = WIDTH / (until - since);
  const x = (time) => Math.min(WIDTH, Math.max(0, (time - since) * scale));
  return html`<div class="timeline">
    ${rows.map(
      (row) => html`<div class="timeline-row" key=${row.label}>
        <span class="label" title=${row.label}><span class="host">${row.label.slice(0, row.label.indexOf(" "))}</span><span>${row.label.slice(row.label.indexOf(" "))}</span></span>
        <svg style=${{ height: `${row.lanes * ROW}px` }} viewBox=${`0 0 ${WIDTH} ${row.lanes * ROW}`} preserveAspectRatio="none" role="group" aria-label=${row.label}>
          ${row.placed.map(({ span, lane }) => {
            const y = lane * ROW + 2;
            const from = x(span.since);
            const width = Math.max(1.5, x(span.until ?? until) - from);
            const kind = span.model ? modelClass(span.model) : "node";
            return html`<g class="span ${span.status}" tabindex="0" role="button" aria-label=${told(span, until)} onClick=${() => choose(span)} onFocus=${() => choose(span)}>
              <title>${told(span, until)}</title>
              <rect class="part ${kind}" x=${from} y=${y} width=${width} height=${ROW - 4} />
              ${span.status === "loaded" ? null : html`<rect class="mark ${span.status}" x=${from} y=${y} width=${width} height=${ROW - 4} />`}
            </g>`;
          })}
        </svg>
      </div>`,
    )}
    <div class="timeline-row axis"><span class="label"></span><span class="row between"><span>${clock(since)}</span><span>${clock((since + until) / 2)}</span><span>${clock(until)}</span></span></div>
  </div>`;
}

function Chart({ timeline, what, title }) {
  const box = useRef(null);
  const { minutes, from, to } = timeline;
  const models = useMemo(() => [...new Set(minutes.flatMap((minute) => Object.keys(minute[what] ?? {})))].sort(), [minutes, what]);
  useEffect(() => {
    if (!minutes.length || !models.length) return undefined;
    const data = [minutes.map((minute) => minute.at), ...models.map((model) => minutes.map((minute) => minute[what]?.[model] ?? 0))];
    const colours = getComputedStyle(document.documentElement);
    const series = models.map((model) => ({ label: model, stroke: colours.getPropertyValue(`--${modelClass(model)}`), width: 2 }));
    const axis = { stroke: colours.getPropertyValue("--text"), grid: { stroke: colours.getPropertyValue("--line"), width: 1 } };
    // The same time as the picture above, also if there are figures of its last minute only; counts begin at 0.
    const scales = { x: { range: [from, to] }, y: { range: (chart, least, most) => [0, Math.max(1, most)] } };
    const chart = new uPlot({ width: box.current.clientWidth || 600, height: HEIGHT, scales, series: [{}, ...series], axes: [axis, { ...axis, incrs: STEPS }] }, data, box.current);
    const resized = new ResizeObserver(() => chart.setSize({ width: box.current.clientWidth, height: HEIGHT }));
    resized.observe(box.current);
    return () => {
      resized.disconnect();
      chart.destroy();
    };
  }, [minutes, from, to, models, what]);
  if (!models.length) return null;
  return html`<h2>${title}</h2><div class="chart" ref=${box} role="img" aria-label=${`${title}: ${models.join(", ")}`}></div>`;
}

export function TimelinePage({ fleet }) {
  const [asked, setRange] = useChoice("range", "1 h");
  const range = Object.hasOwn(RANGES, asked) ? asked : "1 h";
  const [chosen, choose] = useState(null);
  const [timeline, error, again] = useRead((signal) => get(`/fleet/timeline?from=${Math.floor(Date.now() / 1000) - RANGES[range]}`, signal), [range]);
  useEffect(() => {
    const timer = setInterval(again, REFRESH_MS);
    return () => clearInterval(timer);
  }, []);
  // Drawn when the timeline is read again, not with every change of the fleet: a large one changes all the time.
  const labels = labelsOf(Object.values(fleet.nodes));
  const picture = useMemo(
    () => timeline && html`<${Picture} rows=${rowsOf(timeline.spans, labels)} since=${timeline.from} until=${timeline.to} choose=${choose} />`,
    [timeline, labels.join()],
  );
  return html`<h1>Timeline</h1>
    <div class="row" role="group" aria-label="Time shown">
      ${Object.keys(RANGES).map((name) => html`<button class=${name === range ? "" : "quiet"} aria-pressed=${name === range} onClick=${() => setRange(name)}>${name}</button>`)}
    </div>
    <${Problem} error=${error} />
    ${picture}
    <p class="chosen" aria-live="polite">${chosen ? html`<${Status} status=${chosen.status} /> ${told(chosen, timeline?.to ?? chosen.since)}` : "Choose a span to read about it."}</p>
    ${timeline && html`<${Chart} timeline=${timeline} what="waiting" title="Requests that waited, at most in each minute" />`}
    ${timeline && html`<${Chart} timeline=${timeline} what="requests" title="Requests in each minute" />`}
    ${timeline && html`<${Chart} timeline=${timeline} what="errors" title="Errors in each minute" />`}`;
}
