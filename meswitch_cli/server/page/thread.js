// The conversation on the screen: asking, stopping, asking again, editing. Two experts may answer side by side; each
// then goes on with its own earlier answers.

import { events, failure, post } from "./api.js";
import { answerElement, decision, showText, showTools, showWho } from "./answer.js";
import { at, button, copyButton, element, newId } from "./dom.js";
import { parameters, systemTurn } from "./sampling.js";
import { save } from "./store.js";

const TITLE_LETTERS = 60;
let chat = newChat();
let answering = null;
let onSaved = () => {};

function newChat() {
  return { id: newId(), title: "", updated: Date.now(), turns: [] };
}

export const currentChat = () => chat;
export const isAnswering = () => answering !== null;
export const stop = () => answering?.abort();

export function open(another = newChat()) {
  stop();
  chat = another;
  show();
}

export function start(saved) {
  onSaved = saved;
  show();
}

// What the model of one side is sent: a question that got no answer is left out, unless it is the newest.
function messagesOf(turns, side) {
  const messages = [];
  for (const turn of turns) {
    if (turn.role === "user") {
      messages.push({ role: "user", content: turn.content });
      continue;
    }
    const answer = turn.answers[side] ?? turn.answers[0];
    if (answer.content) messages.push({ role: "assistant", content: answer.content });
    else messages.pop();
  }
  return [...systemTurn(), ...messages];
}

function show() {
  const box = at("messages");
  box.replaceChildren(at("empty"));
  at("empty").hidden = chat.turns.length > 0;
  chat.turns.forEach((turn, i) => box.append(turn.role === "user" ? userElement(turn, i) : answersElement(turn, i)));
  box.scrollTop = box.scrollHeight;
}

function userElement(turn, i) {
  const message = element("article", "message user");
  const tools = element("div", "tools");
  tools.append(copyButton(() => turn.content), button("Edit", () => edit(i)));
  message.append(element("div", "text", turn.content), tools);
  return message;
}

function answersElement(turn, i) {
  const row = element("div", turn.answers.length > 1 ? "answers beside" : "answers");
  for (const [side, answer] of turn.answers.entries()) {
    const message = answerElement();
    showWho(message, answer);
    showText(message, answer);
    finish(message, answer, i, side);
    row.append(message);
  }
  return row;
}

function finish(message, answer, i, side) {
  const newest = i === chat.turns.length - 1;
  showTools(message, answer, messagesOf(chat.turns.slice(0, i), side), newest && side === 0 ? [button("Again", again)] : []);
}

function again() {
  if (answering || chat.turns.at(-1)?.role !== "assistant") return;
  chat.turns.pop();
  answerAll();
}

// The question goes back into the field; what was said from there on is forgotten once it is sent.
function edit(i) {
  if (answering) return;
  at("prompt").value = chat.turns[i].content;
  at("prompt").dispatchEvent(new Event("input"));
  at("prompt").dataset.replaces = String(i);
  at("replacing").hidden = false;
  at("prompt").focus();
}

export function keepAll() {
  delete at("prompt").dataset.replaces;
  at("replacing").hidden = true;
}

export function ask(text) {
  const replaces = at("prompt").dataset.replaces;
  if (replaces !== undefined) chat.turns.length = Number(replaces);
  keepAll();
  chat.turns.push({ role: "user", content: text });
  chat.title ||= text.slice(0, TITLE_LETTERS);
  return answerAll();
}

async function answerAll() {
  const models = [at("model").value, ...(at("beside").value ? [at("beside").value] : [])];
  const asked = models.map((_, side) => messagesOf(chat.turns, side));
  const turn = { role: "assistant", answers: models.map((model) => ({ asked: model, content: "" })) };
  const [answered, i] = [chat, chat.turns.push(turn) - 1];
  show();
  const row = at("messages").lastChild;
  answering = new AbortController();
  showSending();
  const { signal } = answering;
  await Promise.all(turn.answers.map((answer, side) => answerOne(row.children[side], answer, asked[side], side, signal)));
  answering = null;
  showSending();
  answered.updated = Date.now();
  await save(answered);
  onSaved();
  if (chat === answered) [...row.children].forEach((message, side) => finish(message, turn.answers[side], i, side));
}

async function answerOne(message, answer, messages, side, signal) {
  message.classList.add("waiting");
  message.querySelector(".tools").replaceChildren();
  let due = 0;
  const sent = performance.now();
  const draw = () => {
    due = 0;
    following(() => showText(message, answer));
  };
  try {
    const body = { model: answer.asked, messages, stream: true, stream_options: { include_usage: true }, ...parameters() };
    const response = await post("/v1/chat/completions", body, { "x-meswitch-session": `${chat.id}-${side}` }, signal);
    if (!response.ok) throw new Error(await failure(response));
    Object.assign(answer, decision(response));
    showWho(message, answer);
    for await (const event of events(response)) {
      const more = event.choices?.[0]?.delta?.content;
      if (event.usage) answer.tokens = event.usage.completion_tokens;
      if (!more) continue;
      answer.content += more;
      due ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    answer.stopped = signal.aborted;
    if (!answer.content) answer.error = signal.aborted ? "stopped" : error instanceof TypeError ? "the server does not answer" : error.message;
    else if (!signal.aborted) answer.stopped = true;
  } finally {
    answer.seconds = (performance.now() - sent) / 1000;
    cancelAnimationFrame(due);
    draw();
    message.classList.remove("waiting");
  }
}

// A reader who is at the end stays there while the text grows; one who has scrolled up is left alone.
function following(change) {
  const box = at("messages");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 160;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function showSending() {
  at("send").textContent = answering ? "Stop" : "Send";
}
