// The frame: which page is shown, who is asking, light or dark, and the keyboard.

import { h, html, render, useEffect, useRef, useState } from "./html.js";
import { CallError, get, post, storedKey, useKey } from "./api.js";
import { secs } from "./format.js";
import { Dialog, Problem } from "./parts.js";
import { Store } from "./store.js";
import { ConfigurationPage } from "./pages/configuration.js";
import { FleetPage } from "./pages/fleet.js";
import { LogsPage } from "./pages/logs.js";
import { ModelsPage } from "./pages/models.js";
import { PlaygroundPage } from "./pages/playground.js";
import { RequestsPage } from "./pages/requests.js";
import { TimelinePage } from "./pages/timeline.js";
import { UsagePage } from "./pages/usage.js";

const PAGES = {
  fleet: ["Fleet", FleetPage],
  models: ["Models", ModelsPage],
  requests: ["Requests", RequestsPage],
  timeline: ["Timeline", TimelinePage],
  usage: ["Usage", UsagePage],
  logs: ["Logs", LogsPage],
  playground: ["Playground", PlaygroundPage],
  configuration: ["Configuration", ConfigurationPage],
};
const STALE_SECS = 30;
const store = new Store();

const pageOf = (hash) => {
  const name = hash.replace(/^#\//, "").replace(/\?.*/, "");
  return Object.hasOwn(PAGES, name) ? name : "fleet";
};

function useHash() {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const changed = () => setHash(location.hash);
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return hash;
}

function useTheme() {
  const [theme, setTheme] = useState(localStorage.getItem("cortex-theme") ?? "system");
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("cortex-theme", theme);
  }, [theme]);
  return [theme, setTheme];
}

function SignIn({ problem, start }) {
  const input = useRef(null);
  const [signsIn, setSignsIn] = useState(false);
  useEffect(() => {
    get("/login/settings").then(() => setSignsIn(true), () => setSignsIn(false));
  }, []);
  const submit = (event) => {
    event.preventDefault();
    useKey(input.current.value.trim());
    start();
  };
  return html`<main id="main" class="sign-in">
    <h1>cortex</h1>
    ${problem.status === 403 ? html`<${Problem} error=${problem} />` : null}
    ${problem.status === 401 && storedKey() ? html`<${Problem} error=${problem} />` : null}
    ${signsIn && html`<p><a class="button" href=${`/login?next=${encodeURIComponent(`/?page=${pageOf(location.hash)}`)}`}>Sign in</a></p><p>or</p>`}
    <form onSubmit=${submit}>
      <label for="key">API key</label>
      <input id="key" type="password" autocomplete="off" ref=${input} required />
      <p class="small">It needs the role viewer to see the fleet, and operator to act. This tab forgets it when it is closed. <code>cortex keys create NAME --role viewer</code> makes one.</p>
      <button type="submit">Go on</button>
    </form>
  </main>`;
}

function Shortcuts({ onClose }) {
  return html`<${Dialog} title="Keyboard" onClose=${onClose}>
    <dl class="keys">
      ${Object.entries(PAGES).map(([name, [title]], index) => html`<dt><kbd>${index + 1}</kbd></dt><dd>${title}</dd>`)}
      <dt><kbd>/</kbd></dt><dd>Search</dd>
      <dt><kbd>?</kbd></dt><dd>This list</dd>
    </dl>
    <div class="row end"><button onClick=${onClose}>Close</button></div>
  <//>`;
}

function useKeyboard(actions) {
  useEffect(() => {
    const pressed = (event) => {
      const writes = event.target.closest("input, textarea, select, dialog");
      if (writes || event.ctrlKey || event.metaKey || event.altKey) return;
      const action = actions(event.key);
      if (action) {
        event.preventDefault();
        action();
      }
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
}

function Connection() {
  const [, tick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => tick((number) => number + 1), 1000);
    return () => clearInterval(timer);
  }, []);
  const silent = store.seenAt ? (Date.now() - store.seenAt) / 1000 : 0;
  if (!store.problem && silent < STALE_SECS) return null;
  return html`<p class="problem" role="alert"><span aria-hidden="true">✕ </span>${store.problem ? store.problem.message : "cortex is silent"}: what you see is ${secs(silent)} old.</p>`;
}

function Warnings() {
  return (store.fleet?.warnings ?? []).map((text) => html`<p class="problem" role="alert"><span aria-hidden="true">! </span>${text}</p>`);
}

function App() {
  const [, changed] = useState(0);
  const [who, setWho] = useState(null);
  const [search, setSearch] = useState("");
  const [help, setHelp] = useState(false);
  const [theme, setTheme] = useTheme();
  const page = pageOf(useHash());
  const field = useRef(null);
  const wasLost = useRef(false);
  const askWho = () => get("/dashboard/me").then(setWho, () => null);
  const start = () => {
    setWho(null);
    askWho();
    store.follow();
  };
  useEffect(() => {
    const end = store.subscribe(() => changed((number) => number + 1));
    start();
    return () => {
      end();
      store.stop();
    };
  }, []);
  useKeyboard((key) => {
    const name = Object.keys(PAGES)[Number(key) - 1];
    if (name) return () => (location.hash = `#/${name}`);
    if (key === "/") return () => field.current?.focus();
    if (key === "?") return () => setHelp(true);
    return null;
  });
  const [title, Page] = PAGES[page];
  useEffect(() => {
    document.title = `${title} – cortex`;
  }, [title]);

  const { fleet, problem } = store;
  // A cortex that is back may have been started with other keys, or did not answer when the page was opened.
  useEffect(() => {
    if (wasLost.current && !problem) askWho();
    wasLost.current = Boolean(problem);
  }, [problem]);
  if (problem && (problem.status === 401 || problem.status === 403)) return html`<${SignIn} problem=${problem} start=${start} />`;
  // Not a reload: cortex would send the browser to the issuer, whose session signs it in again.
  const leave = async () => {
    useKey(null);
    await post("/logout").catch(() => null);
    start();
  };
  return html`<a class="skip" href="#main" onClick=${(event) => {
      event.preventDefault();
      document.getElementById("main").focus();
    }}>Skip to the page</a>
    <header>
      <nav aria-label="Pages">${Object.entries(PAGES).map(([name, [label]]) => html`<a href=${`#/${name}`} aria-current=${name === page ? "page" : undefined}>${label}</a>`)}</nav>
      <span class="grow"></span>
      <label class="hidden" for="search">Search hosts and models</label>
      <input id="search" type="search" placeholder="Search" ref=${field} value=${search} onInput=${(event) => setSearch(event.target.value)} />
      <label class="hidden" for="theme">Colours</label>
      <select id="theme" value=${theme} onChange=${(event) => setTheme(event.target.value)}><option value="system">System</option><option value="light">Light</option><option value="dark">Dark</option></select>
      <button class="quiet" onClick=${() => setHelp(true)} aria-label="Keyboard shortcuts">?</button>
      ${who?.name && html`<span class="small">${who.name} (${who.role})</span>`}
      ${who?.leaves && html`<button class="quiet" onClick=${leave}>Sign out</button>`}
    </header>
    <main id="main" tabindex="-1">
      <${Connection} />
      <${Warnings} />
      ${fleet ? h(Page, { fleet, search, mayAct: Boolean(who?.may_act), mayConfigure: Boolean(who?.may_configure) }) : html`<p role="status">Reading the fleet …</p>`}
    </main>
    ${help && html`<${Shortcuts} onClose=${() => setHelp(false)} />`}`;
}

// Back from a sign-in: the address of the page was kept in the query, since a fragment does not reach the server.
const asked = new URLSearchParams(location.search).get("page");
if (asked) history.replaceState(null, "", `/#/${pageOf(`#/${asked}`)}`);

const root = document.getElementById("app");
root.textContent = "";
render(h(App), root);
