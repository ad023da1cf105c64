// The fleet as cortex tells it: once as a whole, then what changes. The only owner of that state in the browser.

import { CallError, events } from "./api.js";
import { colourOf } from "./format.js";

const RETRY_MS = [500, 1000, 2000, 5000];
// Of a client without cortex's sign of life: a comment comes after 15 s of silence.
const SILENCE_MS = 40000;

// RFC 7396. Objects that do not change stay the same objects, so that views can compare them.
export function applied(state, patch) {
  if (patch === null || typeof patch !== "object" || Array.isArray(patch)) return patch;
  const isObject = state !== null && typeof state === "object" && !Array.isArray(state);
  const merged = isObject ? { ...state } : {};
  for (const [name, value] of Object.entries(patch)) {
    if (value === null) delete merged[name];
    else merged[name] = applied(merged[name], value);
  }
  return merged;
}

export class Store {
  constructor() {
    this.fleet = null; // null until the first event
    this.problem = null; // a CallError while cortex does not answer
    this.seenAt = 0;
    this._listeners = new Set();
    this._abort = null;
    this._pending = false;
  }

  subscribe(listener) {
    this._listeners.add(listener);
    return () => this._listeners.delete(listener);
  }

  // Follows the fleet until `stop`, over interruptions. Ends at an error that another attempt would not heal.
  async follow() {
    this.stop();
    const abort = (this._abort = new AbortController());
    for (let failures = 0; !abort.signal.aborted; failures += 1) {
      try {
        await this._read(abort.signal, () => {
          failures = 0;
        });
        this._tell(new CallError(0, "ended", "cortex has ended the connection"));
      } catch (error) {
        if (abort.signal.aborted) return;
        this._tell(error instanceof CallError ? error : new CallError(0, "lost", "the connection to cortex was lost"));
        if (error.status === 401 || error.status === 403) return;
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]));
    }
  }

  stop() {
    this._abort?.abort();
    this._abort = null;
  }

  async _read(outer, began) {
    const inner = new AbortController();
    const end = () => inner.abort();
    outer.addEventListener("abort", end);
    let silence = setTimeout(end, SILENCE_MS);
    try {
      for await (const event of events("GET", "/fleet/events?changes=true", { signal: inner.signal })) {
        clearTimeout(silence);
        silence = setTimeout(end, SILENCE_MS);
        began();
        this.seenAt = Date.now();
        if (event.name === "fleet") {
          this.fleet = JSON.parse(event.data);
          Object.keys(this.fleet.models).sort().forEach(colourOf);
        } else if (event.name === "change") this.fleet = applied(this.fleet, JSON.parse(event.data));
        else continue;
        this._tell(null);
      }
    } finally {
      clearTimeout(silence);
      outer.removeEventListener("abort", end);
    }
  }

  // At most once a frame: events of a large fleet come faster than a slow phone draws.
  _tell(problem) {
    this.problem = problem;
    if (this._pending) return;
    this._pending = true;
    const tell = () => {
      this._pending = false;
      for (const listener of this._listeners) listener();
    };
    if (document.hidden) setTimeout(tell, 1000);
    else requestAnimationFrame(tell);
  }
}
