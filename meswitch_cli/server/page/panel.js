// What is where, how fast it goes, and, with an admin key, what is served.

import { failure, headers, post } from "./api.js";
import { at, button, element } from "./dom.js";

const POLL_MILLISECONDS = 1000;
const HISTORY = 120;
const rates = [];
let previous = null;
let shown = "";
// Whom a click may name as the one who should have answered; null where the server keeps no such clicks.
let feedback = null;

export const mayBeTold = () => feedback;

async function poll() {
  const response = await fetch("/v1/status", { headers: headers() }).catch(() => null);
  if (response?.ok) {
    show(await response.json());
  } else {
    at("summary").textContent = await failure(response);
    previous = null;
  }
  setTimeout(poll, document.hidden ? 5 * POLL_MILLISECONDS : POLL_MILLISECONDS);
}

function show(status) {
  const { engine } = status;
  const now = performance.now();
  if (previous) {
    const rate = Math.max(0, (status.completion_tokens - previous.tokens) / ((now - previous.time) / 1000));
    rates.push(rate);
    if (rates.length > HISTORY) rates.shift();
    at("rate").textContent = rate < 10 ? rate.toFixed(1) : Math.round(rate);
    draw();
  }
  previous = { tokens: status.completion_tokens, time: now };
  at("running").textContent = engine.running;
  at("waiting").textContent = engine.waiting;
  at("slots").textContent = `${engine.slots_used}/${engine.slots}`;
  const base = status.base.split("/").filter(Boolean).pop() || status.base;
  at("summary").textContent = `${status.experts.length} experts on ${base}${status.draining ? ", shutting down" : ""}`;
  at("hint").textContent = status.router
    ? "The router picks the expert that fits each message. Pin one to decide yourself."
    : "Pick who answers: the base, or one of its experts.";
  feedback = status.feedback ? [...status.experts.map((expert) => expert.name), "base"] : null;
  showModels(status);
  showExperts(status);
}

function draw() {
  const top = Math.max(...rates, 1);
  const points = rates.map((rate, i) => `${HISTORY - rates.length + i + 1},${(31 - (29 * rate) / top).toFixed(2)}`);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.join(" "));
  at("history").replaceChildren(line);
}

function showModels(status) {
  const names = [...(status.router ? ["auto"] : []), ...status.experts.map((expert) => expert.name), "base"];
  if (names.join("\n") === shown) return;
  shown = names.join("\n");
  const options = (before) => names.map((name) => new Option(before + (name === "auto" ? "auto: the router decides" : name), name));
  const before = at("model").value;
  at("model").replaceChildren(...options(""));
  at("model").value = names.includes(before) ? before : names[0];
  const beside = at("beside").value;
  at("beside").replaceChildren(new Option("compare: off", ""), ...options("compare: "));
  at("beside").value = names.includes(beside) ? beside : "";
  showPinned();
}

function megabytes(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : bytes >= 1e6 ? `${(bytes / 1e6).toFixed(1)} MB` : `${Math.ceil(bytes / 1e3)} kB`;
}

function expertItem(name) {
  const item = element("li");
  item.dataset.name = name;
  const choose = element("button", "expert");
  choose.type = "button";
  choose.append(element("span", "name", name), element("span", "size"), element("span", "state"), element("span", "size"));
  choose.addEventListener("click", () => pin(name));
  const change = element("div", "change");
  change.append(
    button("Keep on the device", (event) => admin("pin", { name, pinned: event.target.dataset.pinned !== "true" }), "quiet keep"),
    button("Unload", () => confirm(`Unload ${name}?`) && admin("unload", { name })),
  );
  item.append(choose, change);
  return item;
}

function showExperts(status) {
  const list = at("experts");
  const known = new Map([...list.children].map((item) => [item.dataset.name, item]));
  for (const expert of status.experts) {
    let item = known.get(expert.name);
    known.delete(expert.name);
    if (!item) list.append((item = expertItem(expert.name)));
    const [, size, state, busy] = item.firstChild.children;
    item.className = expert.residency;
    size.textContent = megabytes(expert.bytes);
    const place = expert.slot === null ? { host: "in host memory", disk: "on disk", device: "on the device" }[expert.residency] : `on the device, slot ${expert.slot}`;
    state.textContent = place + (expert.pinned ? ", kept there" : "");
    busy.textContent = expert.running + expert.waiting ? `${expert.running} running${expert.waiting ? `, ${expert.waiting} waiting` : ""}` : "";
    item.firstChild.title = `artifact ${expert.artifact.slice(0, 16)}`;
    const keep = item.querySelector(".keep");
    keep.dataset.pinned = String(expert.pinned);
    keep.textContent = expert.pinned ? "Let go" : "Keep on the device";
  }
  for (const item of known.values()) item.remove();
  showPinned();
}

function pin(name) {
  const select = at("model");
  const free = [...select.options].some((option) => option.value === "auto") ? "auto" : "base";
  select.value = select.value === name ? free : name;
  showPinned();
  document.body.classList.remove("experts-open", "chats-open");
  at("prompt").focus();
}

function showPinned() {
  const chosen = at("model").value;
  at("pinned-note").textContent = chosen && chosen !== "auto" && shown.startsWith("auto") ? "pinned" : "";
  for (const item of at("experts").children) item.firstChild.setAttribute("aria-pressed", String(item.dataset.name === chosen));
}

async function admin(what, body) {
  const response = await post(`/v1/experts/${what}`, body).catch(() => null);
  at("change-problem").textContent = response?.ok ? "" : await failure(response);
  return Boolean(response?.ok);
}

export function start() {
  at("model").addEventListener("change", showPinned);
  at("changing").addEventListener("change", () => at("panel").classList.toggle("changing", at("changing").checked));
  at("load-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const name = at("load-name").value.trim();
    const path = at("load-path").value.trim();
    if (name && (await admin("load", path ? { name, path } : { name }))) at("load-form").reset();
  });
  at("key").value = sessionStorage.getItem("key") || "";
  at("key").addEventListener("change", () => sessionStorage.setItem("key", at("key").value));
  poll();
}
