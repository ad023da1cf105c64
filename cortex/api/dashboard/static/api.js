// Requests to cortex. A browser that has signed in sends its cookie; otherwise the API key that was typed in is sent,
// which is kept until the tab is closed.

const KEY = "cortex-key";

export class CallError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function storedKey() {
  return sessionStorage.getItem(KEY);
}

export function useKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

function headers(more) {
  const key = storedKey();
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function failure(response) {
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // not from cortex: the status has to do
  }
  return new CallError(response.status, error?.code, error?.message ?? `${response.status} ${response.statusText}`);
}

async function send(method, path, { body, signal } = {}) {
  const options = { method, signal, headers: headers(body === undefined ? {} : { "Content-Type": "application/json" }) };
  if (body !== undefined) options.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new CallError(0, "unreachable", "cortex does not answer");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export async function get(path, signal) {
  return (await send("GET", path, { signal })).json();
}

export async function post(path, body, signal) {
  return (await send("POST", path, { body: body ?? {}, signal })).json();
}

// The server-sent events of an answer: yields {name, data, comment}. Not EventSource, which can send no headers and no
// body.
export async function* events(method, path, { body, signal } = {}) {
  const response = await send(method, path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let name = "message";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const each of lines) {
      const line = each.endsWith("\r") ? each.slice(0, -1) : each;
      if (line === "") {
        if (data.length) yield { name, data: data.join("\n") };
        name = "message";
        data = [];
      } else if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      else if (line.startsWith("event:")) name = line.slice(6).trim();
      else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    }
  }
}
