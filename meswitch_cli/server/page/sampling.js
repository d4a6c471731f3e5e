// System prompt and sampling: an empty field is the server's own value, and is not sent.

import { at } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const FIELDS = ["system", ...NUMBERS];

export function parameters() {
  const chosen = {};
  for (const name of NUMBERS) {
    const field = at(name);
    if (field.value.trim() !== "" && field.validity.valid) chosen[name] = Number(field.value);
  }
  return chosen;
}

export function systemTurn() {
  const text = at("system").value.trim();
  return text ? [{ role: "system", content: text }] : [];
}

function told() {
  const changed = FIELDS.filter((name) => at(name).value.trim() !== "").length;
  at("changed").textContent = changed ? `${changed} changed` : "";
}

export function start() {
  const kept = JSON.parse(localStorage.getItem("sampling") || "{}");
  for (const name of FIELDS) {
    at(name).value = kept[name] ?? "";
    at(name).addEventListener("input", () => {
      localStorage.setItem("sampling", JSON.stringify(Object.fromEntries(FIELDS.map((field) => [field, at(field).value]))));
      told();
    });
  }
  told();
}
