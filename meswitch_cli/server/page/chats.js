// The list of chats that this browser keeps: open, delete, export.

import { at, button, download, element } from "./dom.js";
import { all, clear, remove } from "./store.js";
import { currentChat, open } from "./thread.js";

export async function list() {
  const chats = await all();
  at("chats-note").textContent = chats.length ? "" : "Chats stay in this browser.";
  for (const id of ["export", "forget"]) at(id).hidden = !chats.length;
  at("chats").replaceChildren(...chats.map(item));
}

function item(chat) {
  const made = element("li");
  const choose = element("button", "chat", chat.title || "Untitled");
  choose.type = "button";
  choose.title = new Date(chat.updated).toLocaleString();
  choose.setAttribute("aria-current", String(chat.id === currentChat().id));
  choose.addEventListener("click", () => {
    open(chat);
    document.body.classList.remove("chats-open");
    list();
  });
  const forget = button("×", async () => {
    await remove(chat.id);
    if (chat.id === currentChat().id) open();
    list();
  });
  forget.setAttribute("aria-label", `Delete ${chat.title}`);
  made.append(choose, forget);
  return made;
}

export function start() {
  at("export").addEventListener("click", async () => download("meswitch-chats.json", JSON.stringify(await all(), null, 2)));
  at("forget").addEventListener("click", async () => {
    if (!confirm("Delete every chat that this browser keeps?")) return;
    await clear();
    open();
    list();
  });
  return list();
}
