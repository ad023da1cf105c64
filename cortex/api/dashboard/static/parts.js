// What several pages use.

import { html, useEffect, useRef, useState } from "./html.js";
import { CallError } from "./api.js";
import { colourOf, mib } from "./format.js";

// Statuses are told by a sign and a word, never by colour alone.
const STATUSES = {
  loaded: ["●", "good"],
  loading: ["◐", "busy"],
  reloading: ["◐", "busy"],
  recovering: ["◐", "warn"],
  sleeping: ["☾", "calm"],
  failed: ["✕", "bad"],
  unloaded: ["○", "calm"],
  down: ["✕", "bad"],
  draining: ["◌", "warn"],
  healthy: ["●", "good"],
};

export function Status({ status, title }) {
  const [sign, kind] = STATUSES[status] ?? ["?", "warn"];
  return html`<span class="status ${kind}" title=${title}><span aria-hidden="true">${sign}</span> ${status}</span>`;
}

export function modelClass(model) {
  return `model-${colourOf(model)}`;
}

// A bar of parts, each {label, value, kind}. What is in it also stands in its text for those who do not see it.
export function Bar({ parts, total, label }) {
  const shown = parts.filter((part) => part.value > 0);
  const text = `${label}: ${shown.map((part) => `${part.label} ${mib(part.value)}`).join(", ") || "empty"}, of ${mib(total)}`;
  let at = 0;
  return html`<svg class="bar" role="img" aria-label=${text} viewBox="0 0 1000 20" preserveAspectRatio="none">
    <title>${text}</title>
    ${shown.map((part) => {
      const width = total ? (part.value / total) * 1000 : 0;
      const x = at;
      at += width;
      return html`<rect class="part ${part.kind}" x=${x} width=${Math.max(width - 1.5, 0.5)} height="20"><title>${part.label}: ${mib(part.value)}</title></rect>`;
    })}
  </svg>`;
}

export function Problem({ error }) {
  if (!error) return null;
  return html`<p class="problem" role="alert"><span aria-hidden="true">✕ </span>${error.message}</p>`;
}

const chosenIn = (hash) => new URLSearchParams(hash.split("?")[1] ?? "");

export const linkTo = (page, choices) => `#/${page}?${new URLSearchParams(choices)}`;

// A choice that stands in the address, so that it can be linked to and outlives a reload. Gives [value, set]; "" is none.
export function useChoice(name, usual = "") {
  const [value, setValue] = useState(chosenIn(location.hash).get(name) ?? usual);
  useEffect(() => {
    const changed = () => setValue(chosenIn(location.hash).get(name) ?? usual);
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  const set = (chosen) => {
    const choices = chosenIn(location.hash);
    if (chosen === usual) choices.delete(name);
    else choices.set(name, chosen);
    const page = location.hash.split("?")[0] || "#/";
    history.replaceState(null, "", choices.size ? `${page}?${choices}` : page);
    setValue(chosen);
  };
  return [value, set];
}

// Runs `read` now and whenever `inputs` change. Gives [result, error, again].
export function useRead(read, inputs) {
  const [state, setState] = useState({ result: null, error: null });
  const [round, setRound] = useState(0);
  useEffect(() => {
    const abort = new AbortController();
    read(abort.signal).then(
      (result) => setState({ result, error: null }),
      (error) => {
        if (error.name !== "AbortError") setState((before) => ({ result: before.result, error: asCallError(error) }));
      },
    );
    return () => abort.abort();
  }, [...inputs, round]);
  return [state.result, state.error, () => setRound((number) => number + 1)];
}

function asCallError(error) {
  return error instanceof CallError ? error : new CallError(0, "page", String(error));
}

// A modal dialog: the browser keeps the focus inside and closes it with Escape.
export function Dialog({ title, onClose, children }) {
  const dialog = useRef(null);
  useEffect(() => {
    dialog.current.showModal();
  }, []);
  return html`<dialog ref=${dialog} onClose=${onClose} aria-labelledby="dialog-title">
    <h2 id="dialog-title">${title}</h2>
    ${children}
  </dialog>`;
}

// Asks before it acts: `consequence` says what will happen, `act` does it.
export function Confirm({ title, consequence, verb, act, onClose }) {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const go = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      await act();
      onClose();
    } catch (failed) {
      setError(asCallError(failed));
      setBusy(false);
    }
  };
  return html`<${Dialog} title=${title} onClose=${onClose}>
    <form onSubmit=${go}>
      <div class="consequence">${consequence}</div>
      <${Problem} error=${error} />
      <div class="row end">
        <button type="button" class="quiet" onClick=${onClose}>Cancel</button>
        <button type="submit" disabled=${busy}>${verb}</button>
      </div>
    </form>
  <//>`;
}
