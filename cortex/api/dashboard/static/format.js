// Numbers and times as people read them.

export const mib = (value) => (value === undefined || value === null ? "–" : value >= 10240 ? `${(value / 1024).toFixed(0)} GiB` : value >= 1024 ? `${(value / 1024).toFixed(1)} GiB` : `${Math.round(value)} MiB`);

export const percent = (value) => (value === undefined || value === null ? "–" : `${Math.round(value)} %`);

export function secs(value) {
  if (value === undefined || value === null) return "–";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  if (value < 172800) return `${Math.round(value / 3600)} h`;
  return `${Math.round(value / 86400)} d`;
}

export const ago = (unixTime, now = Date.now() / 1000) => (unixTime ? `${secs(Math.max(0, now - unixTime))} ago` : "–");

// One formatter and one collator for all: making one takes longer than a thousand uses.
const TIME = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const NAMES = new Intl.Collator(undefined, { numeric: true });

export const clock = (unixTime) => TIME.format(unixTime * 1000);

// The order of names, as for `sort`: gpu2 before gpu10.
export const compareNames = NAMES.compare;

export const count = (value) => (value === undefined || value === null ? "–" : value.toLocaleString());

export const plural = (number, word, many = `${word}s`) => `${number} ${number === 1 ? word : many}`;

// The model's colour, the same on every page: the first twelve differ.
const COLOURS = 12;
const numbers = new Map();

export function colourOf(model) {
  if (!numbers.has(model)) numbers.set(model, numbers.size % COLOURS);
  return numbers.get(model);
}
