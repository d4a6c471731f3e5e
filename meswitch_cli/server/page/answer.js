// One answer: who gave it, its text, how many tokens and how fast, and what can be done with it.

import { failure, post } from "./api.js";
import { copyButton, element } from "./dom.js";
import { render } from "./markdown.js";
import { mayBeTold } from "./panel.js";

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

// What the server's headers say of an answer.
export function decision(response) {
  const told = response.headers.get("x-meswitch-probabilities");
  return {
    expert: response.headers.get("x-meswitch-expert"),
    reason: response.headers.get("x-meswitch-reason"),
    confidence: Number(response.headers.get("x-meswitch-confidence")),
    probabilities: told ? JSON.parse(told) : null,
  };
}

export function answerElement() {
  const made = element("article", "message assistant");
  made.append(element("div", "who"), element("div", "text markdown"), element("div", "tools"));
  return made;
}

// Never 100 % of what is not certain.
function percent(share) {
  const value = 100 * share;
  return value < 10 || (value > 99 && value < 100) ? `${Math.min(value, 99.9).toFixed(1)} %` : `${Math.round(value)} %`;
}

export function showWho(message, answer) {
  const { expert, reason, confidence, probabilities } = answer;
  if (!expert) return;
  const sure = reason === "routed" || reason === "sticky" ? `, ${percent(confidence)} sure` : "";
  message.querySelector(".who").replaceChildren(element("b", "", expert), element("span", "", (REASONS[reason] || reason) + sure));
  message.querySelector(".bars")?.remove();
  // Probabilities are among the experts; of a prompt that is none's field they say nothing.
  if (!probabilities || reason === "out_of_domain") return;
  const bars = element("div", "bars");
  for (const [name, probability] of Object.entries(probabilities)) {
    const chosen = name === expert ? "chosen" : "";
    const bar = element("progress", chosen);
    bar.max = 1;
    bar.value = probability;
    bar.setAttribute("aria-label", `${name}: ${percent(probability)}`);
    bars.append(element("span", chosen, name), bar, element("span", chosen, percent(probability)));
  }
  message.append(bars);
}

export function showText(message, answer) {
  const text = message.querySelector(".text");
  if (answer.error) {
    message.classList.add("failed");
    text.textContent = answer.error;
  } else {
    text.replaceChildren(render(answer.content));
  }
}

function figures({ tokens, seconds, stopped }) {
  const parts = [];
  if (tokens) parts.push(`${tokens} tokens`);
  // From sending to the end, the prompt's reading and the queue with it: what the reader waited for.
  if (tokens && seconds) parts.push(`${(tokens / seconds).toFixed(1)} tokens/s`);
  if (stopped) parts.push("stopped");
  return parts.join(", ");
}

// The line below an answer that has ended; `turns` are what was asked, for what a click teaches the router.
export function showTools(message, answer, turns, more = []) {
  const tools = message.querySelector(".tools");
  const copying = answer.content ? [copyButton(() => answer.content)] : [];
  tools.replaceChildren(...copying, ...more, element("span", "figures", figures(answer)));
  const select = whoWasRight(answer, turns);
  if (select) tools.append(select);
}

// A click that says who should have answered teaches the router, where the server keeps it.
function whoWasRight({ expert, reason }, turns) {
  const names = mayBeTold();
  if (!names || !expert || reason === "pinned") return null;
  const select = element("select", "feedback");
  select.setAttribute("aria-label", "Who should have answered?");
  const others = names.filter((name) => name !== expert);
  select.append(new Option("wrong expert?", ""), ...others.map((name) => new Option(name === "base" ? "none of them" : name, name)));
  select.addEventListener("change", async () => {
    if (!select.value) return;
    const sent = await post("/v1/route/feedback", { messages: turns, expert: select.value }).catch(() => null);
    select.replaceWith(element("span", "feedback", sent?.ok ? `noted: ${select.selectedOptions[0].text}` : await failure(sent)));
  });
  return select;
}
