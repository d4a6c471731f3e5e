"use strict";

const POLL_MILLISECONDS = 1000;
const HISTORY = 120;
const REASONS = {
  routed: "chosen by the router",
  pinned: "pinned by you",
  sticky: "kept for this conversation",
  low_confidence: "the router was not sure, so its fallback answers",
  out_of_domain: "no expert's field, so the router's fallback answers",
  empty: "nothing to route, so the router's fallback answers",
  error: "the router failed, so the base answers",
  unavailable: "the chosen expert is not served now, so the base answers",
};

const at = (id) => document.getElementById(id);
let conversation = [];
const rates = [];
let session = crypto.randomUUID ? crypto.randomUUID() : String(Math.random());
let answering = null;
let previous = null;
let shown = "";
let feedback = null;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function headers(more) {
  const key = at("key").value.trim();
  return { ...(key ? { authorization: `Bearer ${key}` } : {}), ...more };
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function megabytes(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : bytes >= 1e6 ? `${(bytes / 1e6).toFixed(1)} MB` : `${Math.ceil(bytes / 1e3)} kB`;
}

// What is where, and how fast it goes.

async function poll() {
  const response = await fetch("/v1/status", { headers: headers() }).catch(() => null);
  if (response?.ok) {
    show(await response.json());
  } else {
    at("summary").textContent = response ? await failure(response) : "the server does not answer";
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
  const select = at("model");
  const before = select.value;
  select.replaceChildren(...names.map((name) => new Option(name === "auto" ? "auto: the router decides" : name, name)));
  select.value = names.includes(before) ? before : names[0];
  showPinned();
}

function showExperts(status) {
  const list = at("experts");
  const known = new Map([...list.children].map((item) => [item.dataset.name, item]));
  for (const expert of status.experts) {
    let item = known.get(expert.name);
    known.delete(expert.name);
    if (!item) {
      item = element("li");
      item.dataset.name = expert.name;
      const button = element("button");
      button.type = "button";
      button.append(element("span", "name", expert.name), element("span", "size"), element("span", "state"), element("span", "size"));
      button.addEventListener("click", () => pin(expert.name));
      item.append(button);
      list.append(item);
    }
    const [, size, state, busy] = item.firstChild.children;
    item.className = expert.residency;
    size.textContent = megabytes(expert.bytes);
    const place = expert.slot === null ? { host: "in host memory", disk: "on disk", device: "on the device" }[expert.residency] : `on the device, slot ${expert.slot}`;
    state.textContent = place + (expert.pinned ? ", kept there" : "");
    busy.textContent = expert.running + expert.waiting ? `${expert.running} running${expert.waiting ? `, ${expert.waiting} waiting` : ""}` : "";
    item.firstChild.title = `artifact ${expert.artifact.slice(0, 16)}`;
  }
  for (const item of known.values()) item.remove();
  showPinned();
}

function pin(name) {
  const select = at("model");
  const free = [...select.options].some((option) => option.value === "auto") ? "auto" : "base";
  select.value = select.value === name ? free : name;
  showPinned();
  showPanel(false);
  at("prompt").focus();
}

function showPinned() {
  const chosen = at("model").value;
  at("pinned-note").textContent = chosen && chosen !== "auto" && shown.startsWith("auto") ? "pinned" : "";
  for (const item of at("experts").children) item.firstChild.setAttribute("aria-pressed", String(item.dataset.name === chosen));
}

// The conversation.

function bubble(role) {
  const message = element("article", `message ${role}`);
  message.append(element("div", "who"), element("div", "text"));
  at("empty").hidden = true;
  at("messages").append(message);
  return message;
}

function showWho(message, response) {
  const expert = response.headers.get("x-meswitch-expert");
  const reason = response.headers.get("x-meswitch-reason");
  if (!expert) return;
  const sure = reason === "routed" || reason === "sticky" ? `, ${Math.round(100 * Number(response.headers.get("x-meswitch-confidence")))} % sure` : "";
  message.querySelector(".who").replaceChildren(element("b", "", expert), element("span", "", (REASONS[reason] || reason) + sure));
  const told = response.headers.get("x-meswitch-probabilities");
  // Probabilities are among the experts; of a prompt that is none's field they say nothing.
  if (!told || reason === "out_of_domain") return;
  const bars = element("div", "bars");
  for (const [name, probability] of Object.entries(JSON.parse(told))) {
    const chosen = name === expert ? "chosen" : "";
    const bar = element("progress", chosen);
    bar.max = 1;
    bar.value = probability;
    bar.setAttribute("aria-label", `${name}: ${Math.round(100 * probability)} %`);
    bars.append(element("span", chosen, name), bar, element("span", chosen, `${(100 * probability).toFixed(probability < 0.1 ? 1 : 0)} %`));
  }
  message.append(bars);
}

// A click that says who should have answered teaches the router, where the server keeps it.

function askWhoWasRight(message, turns, response) {
  const expert = response.headers.get("x-meswitch-expert");
  if (!feedback || !expert || response.headers.get("x-meswitch-reason") === "pinned") return;
  const select = element("select", "feedback");
  select.setAttribute("aria-label", "Who should have answered?");
  const names = feedback.filter((name) => name !== expert);
  select.append(new Option("wrong expert?", ""), ...names.map((name) => new Option(name === "base" ? "none of them" : name, name)));
  select.addEventListener("change", async () => {
    if (!select.value) return;
    const sent = await fetch("/v1/route/feedback", {
      method: "POST",
      headers: headers({ "content-type": "application/json" }),
      body: JSON.stringify({ messages: turns, expert: select.value }),
    }).catch(() => null);
    select.replaceWith(element("span", "feedback", sent?.ok ? `noted: ${select.selectedOptions[0].text}` : sent ? await failure(sent) : "the server does not answer"));
  });
  message.append(select);
}

function follow() {
  const box = at("messages");
  if (box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function send(text) {
  const turns = conversation;
  turns.push({ role: "user", content: text });
  bubble("user").querySelector(".text").textContent = text;
  const message = bubble("assistant");
  const target = message.querySelector(".text");
  message.classList.add("waiting");
  at("messages").scrollTop = at("messages").scrollHeight;
  answering = new AbortController();
  showSending();
  let answer = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers({ "content-type": "application/json", "x-meswitch-session": session }),
      body: JSON.stringify({ model: at("model").value, messages: turns, stream: true }),
      signal: answering.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    showWho(message, response);
    askWhoWasRight(message, turns.slice(), response);
    for await (const event of events(response)) {
      answer += event.choices[0]?.delta.content || "";
      target.textContent = answer;
      follow();
    }
    turns.push({ role: "assistant", content: answer });
  } catch (error) {
    if (answering.signal.aborted && answer) {
      turns.push({ role: "assistant", content: answer });
    } else {
      turns.pop();
      message.classList.add("failed");
      target.textContent = answering.signal.aborted ? "stopped" : error instanceof TypeError ? "the server does not answer" : error.message;
    }
  } finally {
    message.classList.remove("waiting");
    answering = null;
    showSending();
    follow();
  }
}

function showPanel(open) {
  at("panel").classList.toggle("open", open);
  at("toggle").setAttribute("aria-expanded", String(open));
  at("toggle").textContent = open ? "Chat" : "Experts";
}

function showSending() {
  at("send").textContent = answering ? "Stop" : "Send";
}

function grow() {
  const prompt = at("prompt");
  if (CSS.supports("field-sizing", "content")) return;
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering) {
    answering.abort();
    return;
  }
  const text = at("prompt").value.trim();
  if (!text) return;
  at("prompt").value = "";
  grow();
  send(text);
});
at("prompt").addEventListener("input", grow);
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!answering) at("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && answering) answering.abort();
});
at("model").addEventListener("change", showPinned);
at("clear").addEventListener("click", () => {
  answering?.abort();
  conversation = [];
  session = crypto.randomUUID ? crypto.randomUUID() : String(Math.random());
  at("messages").replaceChildren(at("empty"));
  at("empty").hidden = false;
  at("prompt").focus();
});
at("toggle").addEventListener("click", () => showPanel(!at("panel").classList.contains("open")));
at("key").value = sessionStorage.getItem("key") || "";
at("key").addEventListener("change", () => sessionStorage.setItem("key", at("key").value));
poll();
