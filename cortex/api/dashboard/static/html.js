// The view library, bound once: h, html, render and hooks.
import { h, render, Fragment } from "./vendor/preact.js";
import htm from "./vendor/htm.js";
export { useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/preact-hooks.js";
export { h, render, Fragment };
export const html = htm.bind(h);
