// A quick try: a chat with a picked model, streamed, with what a cold start is doing meanwhile; embeddings and rerank.

import { html, useEffect, useRef, useState } from "../html.js";
import { CallError, events, post } from "../api.js";
import { secs } from "../format.js";
import { Problem, useChoice } from "../parts.js";

const KINDS = ["chat", "embeddings", "rerank"];

async function chat(model, messages, signal, show) {
  const began = performance.now();
  let text = "";
  let reasoning = "";
  let usage = null;
  let first = null;
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  for await (const event of events("POST", "/v1/chat/completions", { body, signal })) {
    if (event.comment !== undefined) {
      if (event.comment && event.comment !== "keep-alive") show({ text, reasoning, note: event.comment });
      continue;
    }
    if (event.data === "[DONE]") break;
    const chunk = JSON.parse(event.data);
    if (chunk.error) throw new CallError(chunk.error.status ?? 0, chunk.error.code, chunk.error.message);
    const delta = chunk.choices?.[0]?.delta ?? {};
    text += delta.content ?? "";
    reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
    usage = chunk.usage ?? usage;
    if (first === null && (text || reasoning)) first = (performance.now() - began) / 1000;
    show({ text, reasoning, note: null });
  }
  const took = (performance.now() - began) / 1000;
  const speed = usage && first !== null && took > first ? `, ${(usage.completion_tokens / (took - first)).toFixed(0)} tokens/s` : "";
  show({ text, reasoning, note: null, facts: `first token after ${secs(first)}, whole answer after ${secs(took)}${speed}` });
}

function Message({ role, text, reasoning, note, facts }) {
  return html`<article class="message ${role}" aria-label=${role === "user" ? "You" : "Model"}>
    ${reasoning ? html`<details><summary>Reasoning</summary><p class="pre">${reasoning}</p></details>` : null}
    <p class="pre">${text}</p>
    ${note ? html`<p class="small" role="status">${note}</p>` : null}
    ${facts ? html`<p class="small">${facts}</p>` : null}
  </article>`;
}

export function PlaygroundPage({ fleet }) {
  const models = [...new Set([...Object.keys(fleet.models), ...Object.keys(fleet.aliases), ...Object.values(fleet.nodes).flatMap((node) => Object.values(node.models ?? {}).map((view) => view.id))])].sort();
  const [kind, setKind] = useState("chat");
  const [chosen, choose] = useChoice("model");
  const model = models.includes(chosen) ? chosen : (models[0] ?? "");
  const [messages, setMessages] = useState([]);
  const [answer, setAnswer] = useState(null);
  const [result, setResult] = useState(null);
  const [error, setError] = useState(null);
  const [running, setRunning] = useState(null);
  const input = useRef(null);
  const documents = useRef(null);
  const request = useRef(null);
  useEffect(() => () => request.current?.abort(), []);

  // A question without an answer goes back into the field: many chat templates refuse two questions in a row.
  async function converse(text, signal) {
    const asked = [...messages, { role: "user", content: text }];
    let last = null;
    const keep = () => setMessages([...asked, { role: "assistant", content: last.text, reasoning: last.reasoning, facts: last.facts }]);
    setMessages(asked);
    input.current.value = "";
    try {
      await chat(model, asked.map(({ role, content }) => ({ role, content })), signal, (now) => setAnswer((last = now)));
      keep();
    } catch (failed) {
      if (last?.text) keep();
      else {
        setMessages(messages);
        if (input.current) input.current.value ||= text;
      }
      throw failed;
    }
  }

  async function run(event) {
    event.preventDefault();
    const text = input.current.value.trim();
    if (!text || running) return;
    const abort = new AbortController();
    request.current = abort;
    setRunning(abort);
    setError(null);
    try {
      if (kind === "chat") {
        await converse(text, abort.signal);
      } else if (kind === "embeddings") {
        setResult(await post("/v1/embeddings", { model, input: text }, abort.signal));
      } else {
        const lines = documents.current.value.split("\n").filter((line) => line.trim());
        setResult(await post("/v1/rerank", { model, query: text, documents: lines }, abort.signal));
      }
    } catch (failed) {
      if (failed.name !== "AbortError") setError(failed);
    } finally {
      setAnswer(null);
      setRunning(null);
    }
  }

  const isSending = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;
  // The answer to the old kind would have other fields.
  const pick = (name) => {
    running?.abort();
    setKind(name);
    setResult(null);
    setError(null);
  };
  return html`<h1>Playground</h1>
    <div class="row">
      <div class="row" role="group" aria-label="Kind of request">${KINDS.map((name) => html`<button class=${name === kind ? "" : "quiet"} aria-pressed=${name === kind} onClick=${() => pick(name)}>${name}</button>`)}</div>
      <label for="model">Model</label>
      <select id="model" value=${model} onChange=${(event) => choose(event.target.value)}>${models.map((name) => html`<option value=${name}>${name}</option>`)}</select>
      ${kind === "chat" && messages.length ? html`<button class="quiet" onClick=${() => setMessages([])}>New chat</button>` : null}
    </div>
    ${kind === "chat" && html`<div class="messages" aria-live="polite">
      ${messages.map((message, index) => html`<${Message} key=${index} role=${message.role} text=${message.content} reasoning=${message.reasoning} facts=${message.facts} />`)}
      ${answer && html`<${Message} role="assistant" ...${answer} />`}
      ${running && !answer && html`<p class="small" role="status">Waiting for the model …</p>`}
    </div>`}
    <${Problem} error=${error} />
    <form onSubmit=${run}>
      <label for="prompt">${kind === "rerank" ? "Query" : kind === "chat" ? "Message" : "Text"}</label>
      <textarea id="prompt" ref=${input} rows="3" onKeyDown=${(event) => isSending(event) && run(event)}></textarea>
      ${kind === "rerank" && html`<label for="documents">Documents, one per line</label><textarea id="documents" ref=${documents} rows="5"></textarea>`}
      <div class="row end">
        ${running && html`<button type="button" class="quiet" onClick=${() => running.abort()}>Stop</button>`}
        ${models.length ? null : html`<p class="small">There is no model: models.toml lists none, and no host has one.</p>`}
        <button type="submit" disabled=${Boolean(running) || !models.length}>Send</button>
      </div>
    </form>
    ${kind === "embeddings" && result && html`<p>${result.data.length} vector, ${result.data[0].embedding.length} dimensions: ${result.data[0].embedding.slice(0, 6).map((value) => Number(value).toFixed(4)).join(", ")} …</p>`}
    ${kind === "rerank" && result && html`<ol>${result.results.map((each) => html`<li>${each.relevance_score.toFixed(4)} – ${each.document?.text ?? `document ${each.index + 1}`}</li>`)}</ol>`}`;
}
