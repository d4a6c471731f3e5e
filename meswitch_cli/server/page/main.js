// Keys, buttons, and the parts of the page put together.

import * as chats from "./chats.js";
import { at } from "./dom.js";
import * as panel from "./panel.js";
import * as sampling from "./sampling.js";
import * as thread from "./thread.js";

function toggle(name) {
  const other = name === "experts" ? "chats" : "experts";
  document.body.classList.toggle(`${name}-open`);
  document.body.classList.remove(`${other}-open`);
  for (const [id, open] of [["toggle", "experts-open"], ["chats-toggle", "chats-open"]]) {
    at(id).setAttribute("aria-expanded", String(document.body.classList.contains(open)));
  }
}

function grow() {
  const prompt = at("prompt");
  if (CSS.supports("field-sizing", "content")) return;
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (thread.isAnswering()) {
    thread.stop();
    return;
  }
  const text = at("prompt").value.trim();
  if (!text) return;
  at("prompt").value = "";
  grow();
  thread.ask(text);
});
at("prompt").addEventListener("input", grow);
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!thread.isAnswering()) at("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") thread.stop();
});
at("replacing").addEventListener("click", () => {
  at("prompt").value = "";
  thread.keepAll();
});
at("clear").addEventListener("click", () => {
  thread.open();
  chats.list();
  at("prompt").focus();
});
at("toggle").addEventListener("click", () => toggle("experts"));
at("chats-toggle").addEventListener("click", () => toggle("chats"));

sampling.start();
panel.start();
thread.start(chats.list);
chats.start();
